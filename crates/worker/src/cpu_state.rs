//! A state in host memory: what every CPU engine keeps.

use std::ops::Range;
use std::sync::Arc;

use lacuna_recipe::adamw;
use lacuna_recipe::digest::Crc64;
use lacuna_recipe::init;
use lacuna_recipe::state::{Layout, Section, TensorDigests};

use crate::engine::UpdateScalars;

/// Parameters and moments as three flat buffers that never move.
#[derive(Debug)]
pub struct CpuState {
    layout: Arc<Layout>,
    sections: [Box<[f32]>; 3],
}

impl CpuState {
    /// Creates the initial state of a run's `seed`.
    pub fn fresh(layout: Arc<Layout>, seed: u64) -> Self {
        let zeros = || vec![0f32; layout.numel()].into_boxed_slice();
        let mut param = zeros();
        for (block, spec) in layout.params().iter().enumerate() {
            init::fill(spec, seed, &mut param[layout.range(block)]);
        }
        let sections = [param, zeros(), zeros()];
        CpuState { layout, sections }
    }

    /// Returns the tensors in canonical order.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Returns a whole flat section. Its address is stable for the life of the state.
    pub fn section(&self, section: Section) -> &[f32] {
        &self.sections[section as usize]
    }

    /// Returns a whole flat section for writing.
    pub fn section_mut(&mut self, section: Section) -> &mut [f32] {
        &mut self.sections[section as usize]
    }

    /// Applies one AdamW update with the mean gradient `mean`, flat.
    pub fn apply(&mut self, mean: &[f32], update: &UpdateScalars) {
        self.apply_with(mean, update, |_| Some(1.0));
    }

    /// The same with a learning rate by tensor: `scales` has a factor for each of the first ones;
    /// those behind them stay as they are.
    pub fn apply_scaled(&mut self, mean: &[f32], update: &UpdateScalars, scales: &[f64]) {
        assert!(scales.len() <= self.layout.n_blocks(), "a factor for a tensor that there is");
        self.apply_with(mean, update, |block| scales.get(block).copied());
    }

    /// Moves the average `to` of the tensor `of` towards it: it keeps `share` of what it was.
    ///
    /// Source: Polyak and Juditsky (1992); with a constant share as `timm.utils.ModelEmaV2`.
    pub fn average(&mut self, of: usize, to: usize, share: f64) {
        let (of, to) = (self.layout.range(of), self.layout.range(to));
        assert!(of.end <= to.start && of.len() == to.len(), "an average lies behind its tensor");
        let (before, behind) = self.sections[Section::Param as usize].split_at_mut(to.start);
        let (share, rest) = (share as f32, (1.0 - share) as f32);
        for (average, value) in behind[..to.len()].iter_mut().zip(&before[of]) {
            *average = share * *average + rest * value;
        }
    }

    /// Returns the parameters and first moments of a range, for optimizers with one moment.
    pub fn param_and_momentum(&mut self, range: Range<usize>) -> (&mut [f32], &mut [f32]) {
        let [param, momentum, _] = &mut self.sections;
        (&mut param[range.clone()], &mut momentum[range])
    }

    fn apply_with(
        &mut self,
        mean: &[f32],
        update: &UpdateScalars,
        scale: impl Fn(usize) -> Option<f64>,
    ) {
        assert_eq!(mean.len(), self.layout.numel(), "one gradient per element");
        let [param, exp_avg, exp_avg_sq] = &mut self.sections;
        for (block, spec) in self.layout.params().iter().enumerate() {
            let decays = spec.decays(update.decay_tokens);
            let Some(scale) = scale(block) else { continue };
            let lr = update.lr * scale;
            let scalars = update.adamw.update_f32(lr, update.t, decays);
            let range: Range<usize> = self.layout.range(block);
            adamw::apply_f32(
                &scalars,
                &mut param[range.clone()],
                &mut exp_avg[range.clone()],
                &mut exp_avg_sq[range.clone()],
                &mean[range],
            );
        }
    }

    /// Computes the digests of every tensor's sections.
    pub fn tensor_digests(&self) -> Vec<TensorDigests> {
        let digest = |block: usize| {
            let range = self.layout.range(block);
            Section::ALL.map(|s| Crc64::of_f32(&self.section(s)[range.clone()]))
        };
        (0..self.layout.n_blocks()).map(digest).collect()
    }
}
