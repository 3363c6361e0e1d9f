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

    /// Three updates of the reference's optimizer with one gradient. The golden file has norms and
    /// single elements, not the tensors; the rule depends on lengths and on one angle alone, so a
    /// pair of vectors in the plane with those of the first update must give the others.
    #[test]
    fn three_updates_are_those_of_the_reference() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/golden/extra.json")).unwrap();
        let golden = &golden["lars_3steps"];
        let number = |value: &serde_json::Value| value.as_f64().unwrap();
        let (lr, trust) = (number(&golden["lr"]), number(&golden["trust"]));
        let rule = Lars { momentum: number(&golden["momentum"]), trust, weight_decay: 0.0 };
        let of = |step: usize, key: &str| number(&golden["trace"][step][key]);

        let g_norm = trust * of(0, "w_l2") / of(1, "q");
        let p_norm = of(0, "q") * g_norm / trust;
        let moved = lr * of(0, "q") * g_norm;
        let square = |x: f64| x * x;
        let cos = (square(p_norm) + square(moved) - square(of(0, "w_l2"))) / (2.0 * p_norm * moved);
        let g = [g_norm * cos, g_norm * (1.0 - cos * cos).sqrt()].map(|x| x as f32);
        let (mut p, mut m) = ([p_norm as f32, 0.0], [0f32; 2]);
        // A bias has plain momentum: two updates tell its gradient, the third must follow.
        let first = of(1, "b0") - of(0, "b0");
        let b_grad = -first / (lr * (1.0 + rule.momentum));
        let (mut b, mut b_m) = ([(of(0, "b0") + lr * b_grad) as f32], [0f32]);
        for step in 0..3 {
            let q = trust * norm(p.iter().map(|x| f64::from(*x))) / g_norm;
            rule.apply(lr, true, &mut p, &mut m, &g);
            rule.apply(lr, false, &mut b, &mut b_m, &[b_grad as f32]);
            let w_l2 = norm(p.iter().map(|x| f64::from(*x)));
            for (got, key) in [(q, "q"), (w_l2, "w_l2"), (f64::from(b[0]), "b0")] {
                let want = of(step, key);
                assert!((got / want - 1.0).abs() < 1e-6, "step {step}: {key} {got}, not {want}");
            }
        }
    }
}
