//! A step's arithmetic where it takes place: on the host, or on the engine's own device.

use std::time::Duration;

use lacuna_collective::{Collective, CollectiveError};
use lacuna_device::DeviceState;
use lacuna_recipe::reduce::{ControlWord, ReduceError, Reducer, Request, SlotGrad, Verdict};
use lacuna_recipe::step::SlotBatch;

use crate::engine::{DeviceEngine, Engine, EngineError, UpdateScalars};

/// Sums of a step and what follows from them; one for all steps of a generation.
///
/// Both kinds give the same bits. They differ in what crosses the bus: every gradient, or the
/// control word and a few numbers.
#[derive(Debug)]
pub(super) enum StepMath {
    /// Gradients come to the host, and the mean gradient goes back.
    Host { reducer: Box<Reducer>, mean: Vec<f32> },
    /// Everything stays on the engine's device.
    Device { word: ControlWord, n_slots: u32 },
}

/// A step that could not be summed.
#[derive(Debug, thiserror::Error)]
pub(super) enum MathError {
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Reduce(#[from] ReduceError),
}

/// The engine's device half, which it had when the arithmetic was chosen.
fn device(engine: &mut dyn Engine) -> &mut dyn DeviceEngine {
    engine.on_device().expect("an engine on a device stays there")
}

impl StepMath {
    /// Chooses for an engine and steps of `n_slots` slots.
    pub fn new(engine: &mut dyn Engine, n_slots: u32) -> Self {
        if engine.on_device().is_some() {
            return StepMath::Device { word: ControlWord::new(n_slots), n_slots };
        }
        let layout = engine.layout().clone();
        let mean = vec![0f32; layout.numel()];
        StepMath::Host { reducer: Box::new(Reducer::new(layout, n_slots)), mean }
    }

    /// Starts a step whose exponents are `exponents`.
    pub fn begin(&mut self, engine: &mut dyn Engine, exponents: &[i32]) -> Result<(), EngineError> {
        match self {
            StepMath::Host { reducer, .. } => reducer.begin(exponents),
            StepMath::Device { word, n_slots } => {
                *word = ControlWord::new(*n_slots);
                device(engine).state().begin(exponents)?;
            }
        }
        Ok(())
    }

    /// Computes a slot and adds its gradient; returns its loss.
    pub fn slot(&mut self, engine: &mut dyn Engine, batch: &SlotBatch) -> Result<f32, EngineError> {
        match self {
            StepMath::Host { reducer, .. } => {
                let loss = engine.slot(batch, &mut |grad: SlotGrad<'_>| reducer.add(grad))?;
                reducer.end_slot(batch.slot.index, loss);
                Ok(loss)
            }
            StepMath::Device { word, .. } => {
                let loss = device(engine).slot_there(batch)?;
                word.end_slot(batch.slot.index, loss);
                Ok(loss)
            }
        }
    }

    /// Asks, for this rank, that `request` number `id` takes effect at this step.
    pub fn raise(&mut self, request: Request, id: u64) {
        match self {
            StepMath::Host { reducer, .. } => reducer.raise(request, id),
            StepMath::Device { word, .. } => word.raise(request, id),
        }
    }

    /// Sums over all ranks.
    pub fn reduce(
        &mut self,
        engine: &mut dyn Engine,
        comm: &mut dyn Collective,
        deadline: Duration,
    ) -> Result<(), MathError> {
        let word = match self {
            StepMath::Host { reducer, .. } => {
                return Ok(comm.all_reduce_i64(reducer.buffer(), deadline)?);
            }
            StepMath::Device { word, .. } => word,
        };
        let state: &mut DeviceState = device(engine).state();
        state.close(word).map_err(EngineError::from)?;
        if let Some(there) = comm.on_device() {
            let (sums, count, stream) = state.sums();
            return Ok(there.all_reduce_i64_there(sums, count, stream, deadline)?);
        }
        // A group of hosts: its sums make the way there and back.
        let mut sums = state.read_sums().map_err(EngineError::from)?;
        comm.all_reduce_i64(&mut sums, deadline)?;
        Ok(state.write_sums(&sums).map_err(EngineError::from)?)
    }

    /// Reads the sums over all `world` ranks; the mean gradient is ready after
    /// [`Verdict::Apply`].
    pub fn finish(&mut self, engine: &mut dyn Engine, world: usize) -> Result<Verdict, MathError> {
        if let StepMath::Host { reducer, mean } = self {
            return Ok(reducer.finish(world, mean)?);
        }
        let state: &mut DeviceState = device(engine).state();
        let reading = state.word().map_err(EngineError::from)?.read(world)?;
        if let Some(verdict) = reading.verdict() {
            return Ok(verdict);
        }
        let (grad_norm, max_abs) = state.mean().map_err(EngineError::from)?;
        Ok(Verdict::Apply(reading.summary(grad_norm, max_abs)))
    }

    /// Applies the mean gradient.
    pub fn apply(
        &mut self,
        engine: &mut dyn Engine,
        update: &UpdateScalars,
    ) -> Result<(), EngineError> {
        match self {
            StepMath::Host { mean, .. } => engine.apply(mean, update),
            StepMath::Device { .. } => device(engine).apply_there(update),
        }
    }
}
