//! LARS over flat buffers: momentum with a learning rate by layer, for linear probes in large
//! batches. Source of the rule: `util/lars.py` of facebookresearch/mae (You et al., 2017).
//!
//! Norms are sums in f64 in the order of the elements, so every machine finds the same ones.

use serde::{Deserialize, Serialize};

/// Constants of the optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lars {
    /// Decay of the momentum.
    pub momentum: f64,
    /// What the ratio of the norms is multiplied by; 0 makes it plain momentum.
    pub trust: f64,
    /// Weight decay that is part of the gradient of matrices.
    pub weight_decay: f64,
}

/// Returns the norm of a tensor.
fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

impl Lars {
    /// Applies one update to a tensor in place; all slices have one length. Vectors (`is_matrix`
    /// false) have neither decay nor ratio.
    pub fn apply(
        &self,
        lr: f64,
        is_matrix: bool,
        param: &mut [f32],
        momentum: &mut [f32],
        grad: &[f32],
    ) {
        self.update(lr, is_matrix, param, momentum, grad, |x| x as f32);
    }

    /// As `apply`, for numbers of any width: `round` makes one of what was computed in f64.
    fn update<T: Copy + Into<f64>>(
        &self,
        lr: f64,
        is_matrix: bool,
        param: &mut [T],
        momentum: &mut [T],
        grad: &[T],
        round: impl Fn(f64) -> T,
    ) {
        let n = param.len();
        assert!(momentum.len() == n && grad.len() == n, "one length");
        let decay = if is_matrix { self.weight_decay } else { 0.0 };
        let direction = |p: T, g: T| g.into() + decay * p.into();
        let ratio = if is_matrix && self.trust > 0.0 {
            let p_norm = norm(param.iter().map(|p| (*p).into()));
            let d_norm = norm(param.iter().zip(grad).map(|(p, g)| direction(*p, *g)));
            if p_norm > 0.0 && d_norm > 0.0 { self.trust * p_norm / d_norm } else { 1.0 }
        } else {
            1.0
        };
        for ((p, m), g) in param.iter_mut().zip(momentum).zip(grad) {
            let step = ratio * direction(*p, *g);
            *m = round(self.momentum * (*m).into() + step);
            *p = round((*p).into() - lr * (*m).into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECIPE: Lars = Lars { momentum: 0.9, trust: 0.001, weight_decay: 0.0 };

    #[test]
    fn a_matrix_moves_by_its_own_norm() {
        let (mut p, mut m, g) = ([3.0f32, 4.0], [0.0f32; 2], [0.0f32, 2.0]);
        RECIPE.apply(10.0, true, &mut p, &mut m, &g);
        // The ratio is 0.001 · 5 / 2, so the step is 10 · 0.0025 · 2.
        assert_eq!(m, [0.0, 0.005]);
        assert!((p[1] - 3.95).abs() < 1e-6 && p[0] == 3.0);
        RECIPE.apply(10.0, true, &mut p, &mut m, &[0.0; 2]);
        assert!((f64::from(m[1]) - 0.0045).abs() < 1e-9, "a gradient of zero leaves the momentum");
    }

    #[test]
    fn a_vector_has_plain_momentum() {
        let (mut p, mut m) = ([1.0f32], [0.0f32]);
        let decays = Lars { weight_decay: 0.5, ..RECIPE };
        for _ in 0..2 {
            decays.apply(0.1, false, &mut p, &mut m, &[1.0]);
        }
        assert!((m[0] - 1.9).abs() < 1e-6 && (p[0] - (1.0 - 0.1 - 0.19)).abs() < 1e-6);
    }

    #[test]
    fn decay_is_part_of_the_direction() {
        let (mut p, mut m) = ([2.0f32], [0.0f32]);
        let plain = Lars { momentum: 0.0, trust: 0.0, weight_decay: 0.1 };
        plain.apply(1.0, true, &mut p, &mut m, &[0.3]);
        assert!((p[0] - 1.5).abs() < 1e-6, "{p:?}");
    }

    /// Returns the reference's inputs: numbers in [-1, 1) of 24 bits, drawn by name.
    fn drawn(name: &str, n: usize) -> Vec<f64> {
        let mut state = crate::init::fnv1a64(name);
        let mut draw = || {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            2.0 * ((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 24) - 1.0
        };
        (0..n).map(|_| draw()).collect()
    }

    /// Three updates of a matrix of 20 numbers and a bias of 5 are those of an independent
    /// reference: in f64 to twelve digits, and in the f32 of a run as far as f32 goes.
    #[test]
    fn three_updates_are_those_of_the_reference() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/golden/extra.json")).unwrap();
        let golden = &golden["lars_3steps"];
        let number = |key: &str| golden[key].as_f64().unwrap();
        let (lr, trust) = (number("lr"), number("trust"));
        let rule = Lars { momentum: number("momentum"), trust, weight_decay: number("wd") };
        let (mut w, w_grad) = (drawn("lars:w", 20), drawn("lars:gw", 20));
        let (mut b, b_grad) = (drawn("lars:b", 5), drawn("lars:gb", 5));
        let (mut w_m, mut b_m) = (vec![0.0; 20], vec![0.0; 5]);
        let narrow = |x: &[f64]| -> Vec<f32> { x.iter().map(|x| *x as f32).collect() };
        let (mut w32, mut w32_m, mut b32, mut b32_m) =
            (narrow(&w), vec![0f32; 20], narrow(&b), vec![0f32; 5]);
        let l2 = |x: &[f64]| norm(x.iter().copied());
        for step in 0..3 {
            let q = trust * l2(&w) / l2(&w_grad);
            rule.update(lr, true, &mut w, &mut w_m, &w_grad, |x| x);
            rule.update(lr, false, &mut b, &mut b_m, &b_grad, |x| x);
            rule.apply(lr, true, &mut w32, &mut w32_m, &narrow(&w_grad));
            rule.apply(lr, false, &mut b32, &mut b32_m, &narrow(&b_grad));
            let wide = [("q", q), ("w_l2", l2(&w)), ("w00", w[0]), ("b_l2", l2(&b)), ("b0", b[0])];
            for (key, got) in wide {
                let want = golden["trace"][step][key].as_f64().unwrap();
                assert!((got / want - 1.0).abs() < 1e-12, "step {step}: {key} {got}, not {want}");
            }
            for (got, want) in w32.iter().zip(&w).chain(b32.iter().zip(&b)) {
                assert!((f64::from(*got) / want - 1.0).abs() < 1e-6, "step {step}: {got}, {want}");
            }
        }
    }
}
