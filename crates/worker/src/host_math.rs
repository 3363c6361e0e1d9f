//! A step's arithmetic on the host: gradients are summed in buckets, over the ranks too while the
//! last slot still computes.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use lacuna_collective::{Collective, CollectiveError};
use lacuna_recipe::reduce::{Buckets, Part, ReduceError, Reducer, Reduction, SlotGrad, Verdict};
use lacuna_recipe::state::Layout;
use lacuna_recipe::step::SlotBatch;

use crate::engine::{Engine, EngineError};

/// Elements of a bucket. Smaller ones overlap more of the backward pass and cost more operations.
const BUCKET_ELEMENTS: usize = 1 << 20;

/// Returns the buckets in which a step of an engine is summed.
pub(crate) fn host_buckets(engine: &dyn Engine) -> Buckets {
    Buckets::new(engine.layout(), &engine.completion(), BUCKET_ELEMENTS)
}

/// Sums of a step in host memory; one for all steps of a generation.
#[derive(Debug)]
pub struct HostMath {
    reducer: Reducer,
    layout: Arc<Layout>,
    buckets: Arc<Buckets>,
    mean: Vec<f32>,
    /// Parts that were summed over the ranks while the last slot computed, or what went wrong.
    summed: Result<Vec<Part>, CollectiveError>,
}

impl HostMath {
    /// Prepares steps of `n_slots` slots of an engine.
    pub fn new(engine: &dyn Engine, reduction: Reduction, n_slots: u32) -> Self {
        let buckets = Arc::new(host_buckets(engine));
        HostMath::of(reduction, engine.layout().clone(), buckets, n_slots)
    }

    /// The same with buckets of at most `elements_max` elements: smaller ones leave earlier.
    pub fn with_buckets(
        engine: &dyn Engine,
        reduction: Reduction,
        n_slots: u32,
        elements_max: usize,
    ) -> Self {
        let layout = engine.layout().clone();
        let buckets = Buckets::new(&layout, &engine.completion(), elements_max);
        HostMath::of(reduction, layout, Arc::new(buckets), n_slots)
    }

    fn of(reduction: Reduction, layout: Arc<Layout>, buckets: Arc<Buckets>, n_slots: u32) -> Self {
        HostMath {
            mean: vec![0f32; layout.numel()],
            reducer: Reducer::of(reduction, layout.clone(), buckets.clone(), n_slots),
            layout,
            buckets,
            summed: Ok(Vec::new()),
        }
    }

    /// Returns the sums, for requests to be raised.
    pub fn reducer(&mut self) -> &mut Reducer {
        &mut self.reducer
    }

    /// Starts a step whose exponents are `exponents`.
    pub fn begin(&mut self, exponents: &[i32]) {
        self.reducer.begin(exponents);
        self.summed = Ok(Vec::new());
    }

    /// Computes a slot and adds its gradient; returns its loss.
    ///
    /// # Errors
    /// The engine's.
    pub fn slot(&mut self, engine: &mut dyn Engine, batch: &SlotBatch) -> Result<f32, EngineError> {
        let reducer = &mut self.reducer;
        let loss = engine.slot(batch, &mut |grad: SlotGrad<'_>| reducer.add(grad))?;
        self.end_slot(batch, loss)?;
        Ok(loss)
    }

    /// Computes the last slot; a thread sums buckets over the ranks as they complete. Returns the
    /// loss, and how long computing took without the wait for the sums. The communicator must be
    /// one that [may change threads](Collective::may_change_threads).
    ///
    /// # Errors
    /// The engine's; a sum that fails is told by [`reduce`](Self::reduce).
    pub fn last_slot(
        &mut self,
        engine: &mut dyn Engine,
        batch: &SlotBatch,
        comm: &mut dyn Collective,
        deadline: Duration,
    ) -> Result<(f32, Duration), EngineError> {
        let began = Instant::now();
        let reducer = &mut self.reducer;
        // Room for all: whoever computes never waits for whoever sums.
        let (ready, parts) = sync_channel::<Part>(self.buckets.lengths().len());
        let (loss, took, summed) = std::thread::scope(|scope| {
            let sum_parts = move || sum_all(comm, &parts, deadline);
            let summing = match Builder::new().name("sum".into()).spawn_scoped(scope, sum_parts) {
                Ok(summing) => summing,
                Err(source) => {
                    let context = "failed to start the thread that sums".to_string();
                    let source = Box::new(source);
                    return (
                        Err(EngineError::Device { context, source }),
                        Duration::ZERO,
                        Ok(Vec::new()),
                    );
                }
            };
            reducer.begin_last_slot();
            let loss = engine.slot(batch, &mut |grad: SlotGrad<'_>| {
                reducer.add(grad);
                while let Some(part) = reducer.take_ready() {
                    // Fails only where a sum has failed, which is told below.
                    let _ = ready.send(part);
                }
            });
            drop(ready);
            let took = began.elapsed();
            (loss, took, summing.join().expect("sums do not panic"))
        });
        self.summed = summed;
        let loss = loss?;
        self.end_slot(batch, loss)?;
        Ok((loss, took))
    }

    fn end_slot(&mut self, batch: &SlotBatch, loss: f32) -> Result<(), EngineError> {
        if !self.reducer.slot_is_complete() {
            let (step, index) = (batch.slot.step.0, batch.slot.index);
            let what = "a tensor has no gradient: every parameter takes part in the loss".into();
            return Err(EngineError::Batch { step, index, what });
        }
        self.reducer.end_slot(batch.slot.index, loss);
        Ok(())
    }

    /// Sums over the ranks what the last slot left: all of it, or the control word.
    ///
    /// # Errors
    /// The communicator's, also of a sum while the last slot computed.
    pub fn reduce(
        &mut self,
        comm: &mut dyn Collective,
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let end = Instant::now() + deadline;
        let mut parts = std::mem::replace(&mut self.summed, Ok(Vec::new()))?;
        let mut rest = self.reducer.take_rest();
        if self.reducer.reduction() == Reduction::Exact && comm.on_device().is_some() {
            self.sum_whole(comm, &mut rest, deadline)?;
        } else {
            rest.iter_mut().try_for_each(|part| sum(comm, part, end))?;
        }
        parts.append(&mut rest);
        self.reducer.put(parts);
        Ok(())
    }

    /// Sums everything in one operation, as members do whose sums are on a device.
    fn sum_whole(
        &self,
        comm: &mut dyn Collective,
        parts: &mut [Part],
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let (layout, n) = (&self.layout, self.layout.numel());
        let mut sums: Vec<i64> = vec![0; n];
        let Some((Part::I64(word), buckets)) = parts.split_last_mut() else { return Ok(()) };
        for (bucket, part) in buckets.iter().enumerate() {
            let Part::I64(part) = part else { panic!("exact sums have 64 bits") };
            self.buckets.scatter(layout, bucket, part, &mut sums);
        }
        sums.extend_from_slice(word);
        comm.all_reduce_i64(&mut sums, deadline)?;
        for (bucket, part) in buckets.iter_mut().enumerate() {
            *part = Part::I64(self.buckets.gather(layout, bucket, &sums));
        }
        word.copy_from_slice(&sums[n..]);
        Ok(())
    }

    /// Reads the sums over all `world` ranks.
    ///
    /// # Errors
    /// [`ReduceError`]: slots or ranks are missing or there twice.
    pub fn finish(&mut self, world: usize) -> Result<Verdict, ReduceError> {
        self.reducer.finish(world, &mut self.mean)
    }

    /// Lists the exponents at which the step overflowed, after [`Verdict::Redo`].
    pub fn overflows(&self) -> Vec<usize> {
        self.reducer.overflows()
    }

    /// Returns the mean gradient, flat in the layout's order, after [`Verdict::Apply`].
    pub fn mean(&self) -> &[f32] {
        &self.mean
    }
}

/// Sums parts as they come. Each has the whole deadline: what the others still compute is no delay.
fn sum_all(
    comm: &mut dyn Collective,
    parts: &Receiver<Part>,
    deadline: Duration,
) -> Result<Vec<Part>, CollectiveError> {
    let mut summed: Vec<Part> = Vec::new();
    for mut part in parts {
        sum(comm, &mut part, Instant::now() + deadline)?;
        summed.push(part);
    }
    Ok(summed)
}

fn sum(comm: &mut dyn Collective, part: &mut Part, end: Instant) -> Result<(), CollectiveError> {
    let left = end.saturating_duration_since(Instant::now());
    match part {
        Part::I64(sums) => comm.all_reduce_i64(sums, left),
        Part::I32(sums) => comm.all_reduce_i32(sums, left),
        Part::F32(sums) => comm.all_reduce_f32(sums, left),
    }
}

#[cfg(test)]
mod tests;
