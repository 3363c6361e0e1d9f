//! A step's arithmetic where it takes place: on the host, or on the engine's own device.

use std::time::{Duration, Instant};

use lacuna_collective::{Collective, CollectiveError};
use lacuna_device::DeviceState;
use lacuna_recipe::reduce::{Buckets, ControlWord, ReduceError, Reduction, Request, Verdict};
use lacuna_recipe::state::Layout;
use lacuna_recipe::step::SlotBatch;

use crate::engine::{DeviceEngine, Engine, EngineError, UpdateScalars};
use crate::host_math::{HostMath, host_buckets};

/// Sums of a step and what follows from them; one for all steps of a generation.
///
/// Both kinds give the same bits. They differ in what crosses the bus: every gradient, or the
/// control word and a few numbers.
#[derive(Debug)]
pub enum StepMath {
    /// Gradients come to the host, and the mean gradient goes back.
    Host(Box<HostMath>),
    /// Everything stays on the engine's device.
    Device {
        /// What the ranks tell each other with the sums.
        word: ControlWord,
        /// Slots of a step.
        n_slots: u32,
    },
}

/// A step that could not be summed.
#[derive(Debug, thiserror::Error)]
pub enum MathError {
    /// The group failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The sums are not those of whole slots.
    #[error(transparent)]
    Reduce(#[from] ReduceError),
}

/// The engine's device half, which it had when the arithmetic was chosen.
fn device(engine: &mut dyn Engine) -> &mut dyn DeviceEngine {
    engine.on_device().expect("an engine on a device stays there")
}

/// Sums over the ranks what lies in the layout's order, with the control word behind it, in the
/// same operations as [`HostMath`].
fn reduce_in_parts(
    buckets: &Buckets,
    layout: &Layout,
    sums: &mut [i64],
    comm: &mut dyn Collective,
    deadline: Duration,
) -> Result<(), CollectiveError> {
    let end = Instant::now() + deadline;
    let left = || end.saturating_duration_since(Instant::now());
    for bucket in 0..buckets.lengths().len() {
        let mut part = buckets.gather(layout, bucket, sums);
        comm.all_reduce_i64(&mut part, left())?;
        buckets.scatter(layout, bucket, &part, sums);
    }
    comm.all_reduce_i64(&mut sums[layout.numel()..], left())
}

impl StepMath {
    /// Chooses for an engine and steps of `n_slots` slots. Devices sum 64-bit integers only; other
    /// sums take the way over the host.
    pub fn new(engine: &mut dyn Engine, reduction: Reduction, n_slots: u32) -> Self {
        if reduction == Reduction::Exact && engine.on_device().is_some() {
            return StepMath::Device { word: ControlWord::new(n_slots), n_slots };
        }
        StepMath::Host(Box::new(HostMath::new(engine, reduction, n_slots)))
    }

    /// Starts a step whose exponents are `exponents`.
    pub fn begin(&mut self, engine: &mut dyn Engine, exponents: &[i32]) -> Result<(), EngineError> {
        match self {
            StepMath::Host(host) => host.begin(exponents),
            StepMath::Device { word, n_slots } => {
                *word = ControlWord::new(*n_slots);
                device(engine).state().begin(exponents)?;
            }
        }
        Ok(())
    }

    /// Computes a slot and adds its gradient; returns its loss and how long that took.
    pub fn slot(
        &mut self,
        engine: &mut dyn Engine,
        batch: &SlotBatch,
    ) -> Result<(f32, Duration), EngineError> {
        let began = Instant::now();
        let loss = match self {
            StepMath::Host(host) => host.slot(engine, batch)?,
            StepMath::Device { word, .. } => {
                let loss = device(engine).slot_there(batch)?;
                word.end_slot(batch.slot.index, loss);
                loss
            }
        };
        Ok((loss, began.elapsed()))
    }

    /// Computes this rank's last slot of the step; where the arithmetic and the group allow it,
    /// what is complete is summed over the ranks meanwhile. A sum that fails is told by
    /// [`reduce`](Self::reduce).
    pub fn last_slot(
        &mut self,
        engine: &mut dyn Engine,
        batch: &SlotBatch,
        comm: &mut dyn Collective,
        deadline: Duration,
    ) -> Result<(f32, Duration), EngineError> {
        match self {
            StepMath::Host(host) if comm.may_change_threads() && comm.world() > 1 => {
                host.last_slot(engine, batch, comm, deadline)
            }
            _ => self.slot(engine, batch),
        }
    }

    /// Asks, for this rank, that `request` number `id` takes effect at this step.
    pub fn raise(&mut self, request: Request, id: u64) {
        match self {
            StepMath::Host(host) => host.reducer().raise(request, id),
            StepMath::Device { word, .. } => word.raise(request, id),
        }
    }

    /// Sums over all ranks what was not summed yet.
    pub fn reduce(
        &mut self,
        engine: &mut dyn Engine,
        comm: &mut dyn Collective,
        deadline: Duration,
    ) -> Result<(), MathError> {
        let word = match self {
            StepMath::Host(host) => return Ok(host.reduce(comm, deadline)?),
            StepMath::Device { word, .. } => word,
        };
        let state: &mut DeviceState = device(engine).state();
        state.close(word).map_err(EngineError::from)?;
        if let Some(there) = comm.on_device() {
            let (sums, count, stream) = state.sums();
            return Ok(there.all_reduce_i64_there(sums, count, stream, deadline)?);
        }
        if comm.world() == 1 {
            // Nobody adds anything.
            return Ok(());
        }
        // A group of hosts: its sums make the way there and back, in the parts of the others.
        let mut sums = state.read_sums().map_err(EngineError::from)?;
        let layout = engine.layout().clone();
        reduce_in_parts(&host_buckets(engine), &layout, &mut sums, comm, deadline)?;
        Ok(device(engine).state().write_sums(&sums).map_err(EngineError::from)?)
    }

    /// Reads the sums over all `world` ranks; the mean gradient is ready after
    /// [`Verdict::Apply`].
    pub fn finish(&mut self, engine: &mut dyn Engine, world: usize) -> Result<Verdict, MathError> {
        if let StepMath::Host(host) = self {
            return Ok(host.finish(world)?);
        }
        let state: &mut DeviceState = device(engine).state();
        let reading = state.word().map_err(EngineError::from)?.read(world)?;
        if let Some(verdict) = reading.verdict() {
            return Ok(verdict);
        }
        let (grad_norm, max_abs) = state.mean().map_err(EngineError::from)?;
        Ok(Verdict::Apply(reading.summary(grad_norm, max_abs)))
    }

    /// Lists the exponents at which the step overflowed, after [`Verdict::Redo`]; all did where
    /// none is listed.
    pub fn overflows(&self) -> Vec<usize> {
        match self {
            StepMath::Host(host) => host.overflows(),
            StepMath::Device { .. } => Vec::new(),
        }
    }

    /// Applies the mean gradient.
    pub fn apply(
        &mut self,
        engine: &mut dyn Engine,
        update: &UpdateScalars,
    ) -> Result<(), EngineError> {
        match self {
            StepMath::Host(host) => engine.apply(host.mean(), update),
            StepMath::Device { .. } => device(engine).apply_there(update),
        }
    }
}
