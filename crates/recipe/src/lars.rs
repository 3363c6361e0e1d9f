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
        let n = param.len();
        assert!(momentum.len() == n && grad.len() == n, "one length");
        let decay = if is_matrix { self.weight_decay } else { 0.0 };
        let direction = |p: f32, g: f32| f64::from(g) + decay * f64::from(p);
        let ratio = if is_matrix && self.trust > 0.0 {
            let p_norm = norm(param.iter().map(|p| f64::from(*p)));
            let d_norm = norm(param.iter().zip(grad).map(|(p, g)| direction(*p, *g)));
            if p_norm > 0.0 && d_norm > 0.0 { self.trust * p_norm / d_norm } else { 1.0 }
        } else {
            1.0
        };
        for ((p, m), g) in param.iter_mut().zip(momentum).zip(grad) {
            let step = ratio * direction(*p, *g);
            *m = (self.momentum * f64::from(*m) + step) as f32;
            *p = (f64::from(*p) - lr * f64::from(*m)) as f32;
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
}
