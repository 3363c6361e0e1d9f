//! Counts of right and wrong predictions.

use std::collections::BTreeMap;

/// A prediction counts as right among the top five if the class is one of so many first ones.
pub const TOP: usize = 5;

/// Predictions of samples whose classes are known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    n: u64,
    top1: u64,
    top5: u64,
    /// Samples of a class (first) that were taken for another or the same (second).
    cells: BTreeMap<(u32, u32), u64>,
}

/// How a class fared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassTally {
    /// The class.
    pub class: u32,
    /// Its samples.
    pub n: u64,
    /// Those whose first prediction was right.
    pub right: u64,
}

impl Tally {
    /// Counts a sample of class `truth`; `ranked` has the predicted classes, the likeliest first.
    ///
    /// # Panics
    /// If nothing was predicted.
    pub fn add(&mut self, truth: u32, ranked: &[u32]) {
        let first = *ranked.first().expect("at least one prediction");
        self.n += 1;
        self.top1 += u64::from(first == truth);
        self.top5 += u64::from(ranked.iter().take(TOP).any(|&class| class == truth));
        *self.cells.entry((truth, first)).or_default() += 1;
    }

    /// Returns the number of samples.
    pub fn n(&self) -> u64 {
        self.n
    }

    /// Returns the share of samples whose first prediction was right; 0 without samples.
    pub fn top1(&self) -> f64 {
        share(self.top1, self.n)
    }

    /// Returns the share of samples whose class was among the first [`TOP`].
    pub fn top5(&self) -> f64 {
        share(self.top5, self.n)
    }

    /// Lists the classes that have samples, by number.
    pub fn classes(&self) -> Vec<ClassTally> {
        let mut out: Vec<ClassTally> = Vec::new();
        for (&(class, predicted), &n) in &self.cells {
            if out.last().is_none_or(|last| last.class != class) {
                out.push(ClassTally { class, n: 0, right: 0 });
            }
            let last = out.last_mut().expect("one was pushed");
            last.n += n;
            last.right += if predicted == class { n } else { 0 };
        }
        out
    }

    /// Returns the mean of the classes' shares, each class counting alike; 0 without samples.
    pub fn mean_per_class(&self) -> f64 {
        let classes = self.classes();
        let sum: f64 = classes.iter().map(|class| share(class.right, class.n)).sum();
        if classes.is_empty() { 0.0 } else { sum / classes.len() as f64 }
    }

    /// Lists the cells of the confusion matrix that are not zero: class, prediction, samples.
    pub fn confusion_cells(&self) -> Vec<(u32, u32, u64)> {
        self.cells.iter().map(|(&(truth, predicted), &n)| (truth, predicted, n)).collect()
    }

    /// Returns the confusion matrix of classes `0..n_classes`: a row for each class, a column for
    /// each prediction.
    ///
    /// # Panics
    /// If a class or a prediction is not below `n_classes`.
    pub fn confusion(&self, n_classes: u32) -> Vec<Vec<u64>> {
        let mut rows = vec![vec![0; n_classes as usize]; n_classes as usize];
        for (&(truth, predicted), &n) in &self.cells {
            rows[truth as usize][predicted as usize] = n;
        }
        rows
    }
}

fn share(part: u64, of: u64) -> f64 {
    if of == 0 { 0.0 } else { part as f64 / of as f64 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hits_and_misses() {
        let mut tally = Tally::default();
        assert_eq!((tally.top1(), tally.top5(), tally.mean_per_class()), (0.0, 0.0, 0.0));
        tally.add(0, &[0, 1]);
        tally.add(0, &[1, 0]);
        tally.add(0, &[0]);
        tally.add(2, &[0, 1, 3, 4, 5, 2]);
        tally.add(2, &[0, 1, 3, 4, 2]);
        assert_eq!((tally.n(), tally.top1(), tally.top5()), (5, 0.4, 0.8));
        let zero = ClassTally { class: 0, n: 3, right: 2 };
        assert_eq!(tally.classes(), [zero, ClassTally { class: 2, n: 2, right: 0 }]);
        assert_eq!(tally.mean_per_class(), 1.0 / 3.0);
        assert_eq!(tally.confusion(3), [[2, 1, 0], [0, 0, 0], [2, 0, 0]]);
        assert_eq!(tally.confusion_cells(), [(0, 0, 2), (0, 1, 1), (2, 0, 2)]);
    }

    proptest! {
        #[test]
        fn the_matrix_adds_up(list in proptest::collection::vec((0u32..6, 0u32..6), 1..80)) {
            let mut tally = Tally::default();
            list.iter().for_each(|&(truth, first)| tally.add(truth, &[first, truth]));
            let matrix = tally.confusion(6);
            let total: u64 = matrix.iter().flatten().sum();
            let diagonal: u64 = (0..6).map(|i| matrix[i][i]).sum();
            prop_assert_eq!(total, tally.n());
            prop_assert_eq!(diagonal as f64 / total as f64, tally.top1());
            prop_assert_eq!(tally.top5(), 1.0);
            for ClassTally { class, n, right } in tally.classes() {
                prop_assert_eq!(matrix[class as usize].iter().sum::<u64>(), n);
                prop_assert_eq!(matrix[class as usize][class as usize], right);
            }
        }
    }
}
