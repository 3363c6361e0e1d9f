//! The engine of a task: starts from an encoder, and follows gradients as the task says.

use std::ops::Range;
use std::sync::Arc;

use lacuna_recipe::digest::Crc64;
use lacuna_recipe::lars::Lars;
use lacuna_recipe::model::ParamSpec;
#[cfg(test)]
use lacuna_recipe::philox::Draws;
use lacuna_recipe::reduce::SlotGrad;
use lacuna_recipe::state::{Layout, Section, TensorDigests};
use lacuna_recipe::step::SlotBatch;
use lacuna_spec::{Optimizer, TaskSpec};
use lacuna_worker::cpu_state::CpuState;
use lacuna_worker::engine::{Engine, EngineError, UpdateScalars};

use super::{BuildEngineError, EngineSetup, Place, TorchEngine};
use crate::classify::{Classification, EncoderWeights, state_params};
use crate::objective::Objective;

/// Decay of the momentum of probes.
const MOMENTUM: f64 = 0.9;
/// What the ratio of norms is multiplied by in LARS.
const TRUST: f64 = 0.001;

/// A [`TorchEngine`] that learns classes.
#[derive(Debug)]
pub struct TaskEngine {
    inner: TorchEngine,
    task: TaskSpec,
    encoder: Arc<EncoderWeights>,
    /// What the learning rate of each tensor is multiplied by that learns.
    scales: Vec<f64>,
    /// The gradient of averages: as many zeros as the largest tensor has elements.
    zeros: Vec<f32>,
}

impl TaskEngine {
    /// Builds the engine, with the encoder's tensors in their places.
    pub fn new(
        setup: EngineSetup,
        task: &TaskSpec,
        encoder: Arc<EncoderWeights>,
    ) -> Result<Self, BuildEngineError> {
        TaskEngine::at(setup, task, encoder, Place::Here)
    }

    /// The same with slots computed at a place; state and updates are on the host.
    pub fn at(
        setup: EngineSetup,
        task: &TaskSpec,
        encoder: Arc<EncoderWeights>,
        place: Place,
    ) -> Result<Self, BuildEngineError> {
        let model = setup.model.clone();
        let learns = Classification::new(task.clone(), encoder.clone());
        let scales = |layout: &Layout| -> Vec<f64> {
            layout.params().iter().map(|spec| learns.scale_of(&spec.name, &model)).collect()
        };
        let objective: Arc<dyn Objective> = Arc::new(learns.clone());
        let mut inner = TorchEngine::at(setup, &objective, place)?;
        let scales = scales(inner.layout());
        let layout = Layout::new(state_params(task, &model));
        inner.state = CpuState::fresh(layout.clone(), inner.setup.seed);
        let sizes = layout.params().iter().map(ParamSpec::numel);
        let zeros = vec![0.0; if task.ema.is_some() { sizes.max().unwrap_or(0) } else { 0 }];
        let mut engine = TaskEngine { scales, inner, task: task.clone(), encoder, zeros };
        for block in 0..layout.n_blocks() {
            let mut values = vec![0.0; layout.range(block).len()];
            engine.initial(block, engine.inner.setup.seed, &mut values);
            let param = engine.inner.state.section_mut(Section::Param);
            param[layout.range(block)].copy_from_slice(&values);
        }
        Ok(engine)
    }

    /// Returns a slot's images as they are shown.
    #[cfg(test)]
    pub fn augmented(&self, batch: &SlotBatch, draws: &[Draws]) -> Vec<u8> {
        self.inner.slot.augmented(batch, draws).into_owned()
    }

    /// Lists the averages with the tensors that they are of.
    fn averages(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let n = self.scales.len();
        let n_averages = self.layout().n_blocks() - n;
        (0..n_averages).map(move |block| (n + block, block))
    }

    /// Applies momentum with or without a rate by layer.
    fn apply_momentum(&mut self, mean: &[f32], update: &UpdateScalars, trust: f64) {
        let rule = Lars { momentum: MOMENTUM, trust, weight_decay: update.adamw.weight_decay };
        let layout = self.inner.layout().clone();
        for (block, spec) in layout.params().iter().enumerate().take(self.scales.len()) {
            let range = layout.range(block);
            let (param, momentum) = self.inner.state.param_and_momentum(range.clone());
            let lr = update.lr * self.scales[block];
            rule.apply(lr, spec.shape.len() > 1, param, momentum, &mean[range]);
        }
    }
}

impl Engine for TaskEngine {
    fn layout(&self) -> &Arc<Layout> {
        self.inner.layout()
    }

    fn completion(&self) -> Vec<usize> {
        let averages = self.averages().map(|(average, _)| average);
        self.inner.completion().into_iter().chain(averages).collect()
    }

    fn slot(
        &mut self,
        batch: &SlotBatch,
        sink: &mut dyn FnMut(SlotGrad<'_>),
    ) -> Result<f32, EngineError> {
        if let Some(label) = batch.labels.iter().flatten().find(|l| **l >= self.task.classes) {
            let what = format!("a label {label}, and `task.classes` = {}", self.task.classes);
            let (step, index) = (batch.slot.step.0, batch.slot.index);
            return Err(EngineError::Batch { step, index, what });
        }
        let loss = self.inner.slot(batch, sink)?;
        // Averages follow weights and no gradient.
        for (block, _) in self.averages() {
            sink(SlotGrad { block, values: &self.zeros[..self.layout().range(block).len()] });
        }
        Ok(loss)
    }

    fn apply(&mut self, mean: &[f32], update: &UpdateScalars) -> Result<(), EngineError> {
        self.inner.changed();
        match self.task.optimizer {
            Optimizer::AdamW => self.inner.state.apply_scaled(mean, update, &self.scales),
            Optimizer::Sgd => self.apply_momentum(mean, update, 0.0),
            Optimizer::Lars => self.apply_momentum(mean, update, TRUST),
        }
        if let Some(share) = self.task.ema {
            for (average, block) in self.averages() {
                self.inner.state.average(block, average, share);
            }
        }
        Ok(())
    }

    fn read(
        &self,
        section: Section,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<(), EngineError> {
        self.inner.read(section, range, out)
    }

    fn write(&mut self, section: Section, at: usize, values: &[f32]) -> Result<(), EngineError> {
        self.inner.write(section, at, values)
    }

    fn initial(&self, block: usize, seed: u64, out: &mut [f32]) {
        // An average begins as what it is of.
        let block = block % self.scales.len();
        let spec = &self.layout().params()[block];
        match self.encoder.initial(&spec.name) {
            Some(values) => out.copy_from_slice(values),
            None => self.inner.initial(block, seed, out),
        }
    }

    fn tensor_digests(&self) -> Result<Vec<TensorDigests>, EngineError> {
        self.inner.tensor_digests()
    }

    /// The encoder is part of what workers must agree on.
    fn probe(&mut self) -> Result<u64, EngineError> {
        let probe = Crc64::of(&self.inner.probe()?.to_le_bytes());
        Ok(probe.then(self.encoder.digest()).value)
    }

    fn device_memory(&self) -> Option<u64> {
        self.inner.device_memory()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}
