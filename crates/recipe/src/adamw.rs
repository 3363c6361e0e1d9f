//! AdamW over flat buffers: the one implementation every CPU engine uses.
//!
//! Plain IEEE operations in a fixed order and no fused multiply-add, so the width of the SIMD unit
//! does not change a bit. The same source serves f32 (training) and f64 (parity tests).

use serde::{Deserialize, Serialize};

/// Constants of the optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of the decayed tensors.
    pub weight_decay: f64,
}

/// Scalars of one update of one tensor, computed in f64 and rounded once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Update<T> {
    keep: T,
    beta1: T,
    one_minus_beta1: T,
    beta2: T,
    one_minus_beta2: T,
    step_size: T,
    root_correction: T,
    eps: T,
}

impl AdamW {
    /// Computes the scalars of update number `t` (1-based) at learning rate `lr`.
    fn scalars(&self, lr: f64, t: u64, decays: bool) -> [f64; 8] {
        assert!(t >= 1, "updates are counted from 1");
        let decay = if decays { self.weight_decay } else { 0.0 };
        let t = t as f64;
        let correction1 = 1.0 - libm::pow(self.beta1, t);
        let correction2 = 1.0 - libm::pow(self.beta2, t);
        [
            1.0 - lr * decay,
            self.beta1,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            lr / correction1,
            1.0 / correction2.sqrt(),
            self.eps,
        ]
    }
}

impl<T> Update<T> {
    /// Returns the scalars in the order in which the arithmetic names them: what the parameter
    /// keeps, beta1, 1 - beta1, beta2, 1 - beta2, the step's size, the root's correction, eps.
    pub fn to_array(self) -> [T; 8] {
        [
            self.keep,
            self.beta1,
            self.one_minus_beta1,
            self.beta2,
            self.one_minus_beta2,
            self.step_size,
            self.root_correction,
            self.eps,
        ]
    }
}

macro_rules! adamw {
    ($real:ty, $update:ident, $apply:ident) => {
        impl AdamW {
            /// Prepares update number `t` (1-based) at learning rate `lr`; `decays` is the tensor's
            /// group.
            pub fn $update(&self, lr: f64, t: u64, decays: bool) -> Update<$real> {
                let [keep, beta1, one_minus_beta1, beta2, one_minus_beta2, size, root, eps] =
                    self.scalars(lr, t, decays).map(|x| x as $real);
                Update {
                    keep,
                    beta1,
                    one_minus_beta1,
                    beta2,
                    one_minus_beta2,
                    step_size: size,
                    root_correction: root,
                    eps,
                }
            }
        }

        /// Applies one update in place; all slices have one length.
        pub fn $apply(
            u: &Update<$real>,
            param: &mut [$real],
            exp_avg: &mut [$real],
            exp_avg_sq: &mut [$real],
            grad: &[$real],
        ) {
            let n = param.len();
            assert!(exp_avg.len() == n && exp_avg_sq.len() == n && grad.len() == n, "one length");
            for (((p, m), v), g) in param.iter_mut().zip(exp_avg).zip(exp_avg_sq).zip(grad) {
                *m = u.beta1 * *m + u.one_minus_beta1 * *g;
                *v = u.beta2 * *v + u.one_minus_beta2 * (*g * *g);
                let denominator = v.sqrt() * u.root_correction + u.eps;
                *p = *p * u.keep - u.step_size * (*m / denominator);
            }
        }
    };
}

adamw!(f32, update_f32, apply_f32);
adamw!(f64, update_f64, apply_f64);

#[cfg(test)]
mod tests {
    use super::*;

    const RECIPE: AdamW = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };

    #[test]
    fn first_update_moves_by_the_learning_rate() {
        let (mut p, mut m, mut v) = ([1.0f64, -2.0], [0.0; 2], [0.0; 2]);
        let u = RECIPE.update_f64(0.01, 1, true);
        apply_f64(&u, &mut p, &mut m, &mut v, &[0.5, -0.25]);
        let keep = 1.0 - 0.01 * 0.05;
        assert!((p[0] - (keep - 0.01)).abs() < 1e-9 && (p[1] - (-2.0 * keep + 0.01)).abs() < 1e-9);
        assert!((m[0] - 0.05).abs() < 1e-15 && (v[0] - 0.0125).abs() < 1e-15);
    }

    #[test]
    fn zero_learning_rate_moves_the_moments_alone() {
        let (mut p, mut m, mut v) = ([1.5f32], [0.0], [0.0]);
        apply_f32(&RECIPE.update_f32(0.0, 1, true), &mut p, &mut m, &mut v, &[3.0]);
        assert_eq!(p, [1.5]);
        assert!(m[0] > 0.29 && v[0] > 0.44);
    }

    #[test]
    fn undecayed_tensors_do_not_shrink() {
        let (mut p, mut m, mut v) = ([1.0f32], [0.0], [0.0]);
        apply_f32(&RECIPE.update_f32(0.1, 1, false), &mut p, &mut m, &mut v, &[0.0]);
        assert_eq!(p, [1.0]);
    }

    /// The bits of many f32 updates, so that a change of the arithmetic cannot go unseen.
    #[test]
    fn bits_are_pinned() {
        let n = 4099;
        let mut p: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).fract() - 0.5).collect();
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        for t in 1..=5 {
            let g: Vec<f32> =
                (0..n).map(|i| ((i as f32 * 0.11 + t as f32).fract() - 0.5) * 1e-2).collect();
            apply_f32(&RECIPE.update_f32(1e-3, t, true), &mut p, &mut m, &mut v, &g);
        }
        let digest = crate::digest::Crc64::of_f32(&p).then(crate::digest::Crc64::of_f32(&v));
        expect_test::expect!["69e52f8e1ca163b9"].assert_eq(&crate::digest::hex(digest.value));
    }
}
