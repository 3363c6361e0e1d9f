//! The step loop: load, compute, reduce, apply. It knows no protocol; the session gives it orders
//! and takes its reports.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use lacuna_collective::{AbortHandle, Collective, CollectiveError, Group};
use lacuna_control::message::{FaultKind, Phase, StepMark};
use lacuna_control::plan::{Origin as SyncOrigin, Plan, Sync};
use lacuna_control::worker::{ORPHAN_CHANGE, Report};
use lacuna_data::loader::{LoadError, Loader, SlotStream};
use lacuna_recipe::reduce::{REQUEST_ID_MAX, Request, Summary, Verdict};
use lacuna_recipe::state::{Counters, state_digest};
use lacuna_recipe::step::SlotBatch;
use lacuna_types::{AttemptSeq, Generation, Incarnation, Slot, Step, WorkerId};
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::fault::{StepError, communicator_fault, suspects_of};
use super::job::Job;
use super::meter::{Meter, memory_in_use, mfu};
use super::metrics::MetricsFile;
use super::reconstructions::Gallery;
use super::saver::Saver;
use super::shared::{Order, SharedHandle};
use super::sync::{SyncError, synchronise};
use crate::engine::{Engine, EngineError, Yardstick, whole_probe};
use crate::step_math::StepMath;
use crate::transport::Peers;

/// Longest wait for one slot of data: far above any healthy read, below anybody's patience.
const DATA_DEADLINE: Duration = Duration::from_secs(120);
/// How long members have to connect, and how much longer for each: none may be slower than others
/// by more than a busy machine makes it.
const FORMING: Duration = Duration::from_secs(30);
const FORMING_OF_EACH: Duration = Duration::from_millis(50);
/// How often a worker that waits for data looks whether its group is still there.
const DATA_LOOK: Duration = Duration::from_secs(5);

// The control word takes every number that a worker may raise.
const _: () = assert!(ORPHAN_CHANGE <= REQUEST_ID_MAX);

/// The loop's own state.
pub struct StepLoop {
    /// The run.
    pub job: Job,
    /// Who this is.
    pub identity: (WorkerId, Incarnation),
    /// The model on its device, with parameters and moments.
    pub engine: Box<dyn Engine>,
    /// Gives the samples of slots.
    pub loader: Loader,
    /// Writes checkpoints.
    pub saver: Saver,
    /// How to meet peers.
    pub peers: Peers,
    /// What the session sees.
    pub shared: SharedHandle,
    /// To the session.
    pub reports: mpsc::Sender<Report>,
    /// The state's counters; `None` before the first synchronisation.
    pub counters: Option<Counters>,
    /// Checkpoint attempt that this rank's newest sum carried, 0 for none.
    pub raised_save: u64,
    /// Written until the loop ends.
    pub metrics: Option<MetricsFile>,
    /// What is drawn now and then.
    pub gallery: Option<Gallery>,
    /// What its speed is measured by.
    pub yardstick: Option<Yardstick>,
    /// How often in a row data was not there in time.
    pub n_late: Cell<u32>,
}

/// A generation this worker is in.
struct Membership {
    plan: Arc<Plan>,
    rank: usize,
    comm: Box<dyn Collective>,
    abort: AbortHandle,
}

impl StepLoop {
    /// Obeys until the session goes.
    pub fn run(mut self, orders: Receiver<Order>) {
        let mut membership: Option<Membership> = None;
        for order in orders {
            match order {
                Order::Leave => {
                    if let Some(mut group) = membership.take()
                        && let Err(err) = group.comm.leave()
                    {
                        self.fault(group.plan.generation, FaultKind::Local, &err);
                    }
                    self.shared.clear_requests();
                    self.enter(Phase::Idle);
                    let state = self.counters.as_ref().map(|c| Step(c.step));
                    self.report(Report::Down { state });
                }
                Order::Connect { plan, comm_id, sync, abort } => {
                    self.shared.clear_requests();
                    membership = self.connect(plan, &comm_id, &sync, abort);
                }
                Order::Adopt { plan } => {
                    self.shared.clear_requests();
                    membership = self.adopt(membership, plan);
                }
                Order::Audit { generation } => self.audit(generation),
                Order::Start { generation } => {
                    if let Some(group) =
                        membership.as_mut().filter(|m| m.plan.generation == generation)
                    {
                        self.train(group);
                        self.enter(Phase::Idle);
                    }
                }
                Order::Save { generation, attempt } => {
                    if let Some(group) =
                        membership.as_ref().filter(|m| m.plan.generation == generation)
                    {
                        self.save(group, attempt, true);
                        self.enter(Phase::Idle);
                    }
                }
            }
        }
    }

    fn enter(&self, phase: Phase) {
        let step = self.counters.as_ref().map_or(0, |c| c.step);
        self.shared.enter(step, phase);
    }

    fn report(&self, report: Report) {
        // Fails only when the session is gone, and the process with it.
        let _ = self.reports.blocking_send(report);
    }

    fn fault(
        &self,
        generation: Generation,
        kind: FaultKind,
        err: &(dyn std::error::Error + 'static),
    ) {
        let detail = lacuna_checkpoint::chain(err);
        warn!(%generation, detail, "fault");
        let suspects = suspects_of(err);
        self.report(Report::Fault { generation, kind, suspects, detail });
    }

    /// Goes on in the communicator of the generation before, at the boundary where all stand.
    fn adopt(&self, before: Option<Membership>, plan: Arc<Plan>) -> Option<Membership> {
        let (worker, incarnation) = &self.identity;
        let generation = plan.generation;
        let mut group = before?;
        if plan.rank(worker, *incarnation) != Some(group.rank) {
            warn!(%generation, "told to keep a communicator in which this worker has another rank");
            return None;
        }
        group.plan = plan;
        self.shared.enter_generation(generation, group.comm.ledger());
        self.report(Report::Adopted { generation, state: Step(self.step()) });
        Some(group)
    }

    /// Computes the probe again: states of this generation's members differ.
    fn audit(&mut self, generation: Generation) {
        self.enter(Phase::Compute);
        match whole_probe(self.engine.as_mut()) {
            Ok(probe) => self.report(Report::Audited { generation, probe }),
            Err(err) => self.fault(generation, FaultKind::Local, &err),
        }
        self.enter(Phase::Idle);
    }

    /// Connects and synchronises; reports either the state or a fault.
    fn connect(
        &mut self,
        plan: Arc<Plan>,
        comm_id: &[u8],
        sync: &Sync,
        abort: AbortHandle,
    ) -> Option<Membership> {
        self.enter(Phase::Sync);
        let generation = plan.generation;
        let (worker, incarnation) = &self.identity;
        let Some(rank) = plan.rank(worker, *incarnation) else {
            warn!(%generation, "told to connect to a group without this worker");
            return None;
        };
        let group = match group_of(&self.job, &plan, rank, comm_id) {
            Ok(group) => group,
            Err(err) => {
                self.fault(generation, FaultKind::Local, err.as_ref());
                return None;
            }
        };
        let deadline = FORMING + FORMING_OF_EACH * plan.world() as u32;
        let mut comm = match self.peers.connect(&group, abort.clone(), deadline) {
            Ok(comm) => comm,
            Err(CollectiveError::Aborted { .. }) => return None,
            Err(err) => {
                self.fault(generation, communicator_fault(&err), &err);
                return None;
            }
        };
        self.shared.enter_generation(generation, comm.ledger());
        // A state that is overwritten is none until it is whole; the others stay what they are.
        let kept =
            matches!(&sync.origin, SyncOrigin::Memory { healed, .. } if !healed.contains(&rank));
        let before = if kept { self.counters.clone() } else { self.counters.take() };
        match synchronise(&self.job, self.engine.as_mut(), before, comm.as_mut(), sync) {
            Ok(counters) => {
                let step = Step(counters.step);
                self.counters = Some(counters);
                match self.digest() {
                    Ok(digest) => {
                        self.report(Report::Synced { generation, step, digest });
                        // While others are not done yet.
                        self.reserve(&plan, rank);
                    }
                    Err(err) => self.fault(generation, FaultKind::Local, &err),
                }
            }
            Err(err) => {
                let kind = match &err {
                    SyncError::Collective(CollectiveError::Aborted { .. }) => return None,
                    SyncError::Collective(err) => communicator_fault(err),
                    SyncError::Checkpoint(err) if err.is_outage() => FaultKind::Outage,
                    SyncError::Checkpoint(_) | SyncError::OtherCheckpoint { .. } => {
                        FaultKind::Checkpoint
                    }
                    SyncError::Engine(_) | SyncError::Peer(_) => FaultKind::Local,
                };
                self.fault(generation, kind, &err);
            }
        }
        Some(Membership { plan, rank, comm, abort })
    }

    pub(super) fn digest(&self) -> Result<u64, EngineError> {
        let counters = self.counters.as_ref().expect("there is a state");
        Ok(state_digest(&self.engine.tensor_digests()?, counters))
    }

    /// Trains to the next boundary: a stop that all agreed on, the end of the run, or a fault.
    fn train(&mut self, group: &mut Membership) {
        let generation = group.plan.generation;
        match self.train_steps(group) {
            Ok(()) => match self.digest() {
                Ok(digest) => {
                    let step = Step(self.step());
                    self.report(Report::Held { generation, step, digest });
                }
                Err(err) => self.fault(generation, FaultKind::Local, &err),
            },
            Err(_) if group.abort.reason().is_some() => {}
            Err(err) => self.fault(generation, err.kind(), &err),
        }
    }

    fn step(&self) -> u64 {
        self.counters.as_ref().expect("there is a state").step
    }

    /// Applies one step after the other, up to the last one or one that says stop.
    fn train_steps(&mut self, group: &mut Membership) -> Result<(), StepError> {
        let total = self.job.resolved.total_steps;
        let slots = group.plan.members[group.rank].slots.clone();
        let first = self.step();
        let mut stream = self.loader.stream(Step(first), Step(total), slots.clone())?;
        let mut math =
            StepMath::new(self.engine.as_mut(), self.job.reduction(), self.job.spec.n_slots());
        let mut meter = Meter::new(0);
        self.draw(group.rank, false);
        while self.step() < total {
            let started = Instant::now();
            let step = self.step();
            let batches = self.load(group, &mut stream, &slots, &mut meter)?;
            let deadline = meter.deadline(step - first);
            let summary = self.compute_step(group, &batches, &mut math, deadline, &mut meter)?;
            batches.into_iter().for_each(|batch| self.loader.recycle(batch));
            meter.step_done(started.elapsed());
            self.after_step(group, &summary, &mut meter)?;
            if summary.stop {
                break;
            }
        }
        Ok(())
    }

    /// Waits for this worker's slots of the next step; gives up when the group is called off.
    fn load(
        &self,
        group: &Membership,
        stream: &mut SlotStream,
        slots: &[u32],
        meter: &mut Meter,
    ) -> Result<Vec<SlotBatch>, StepError> {
        let step = self.step();
        self.shared.enter(step, Phase::Data);
        let started = Instant::now();
        // A store has its own limit, twice: for what was on its way, and for asking again.
        let of_store = Duration::from_secs(self.job.spec.data.deadline_seconds.into());
        let limit = DATA_DEADLINE.max(2 * of_store + DATA_LOOK);
        let mut batches: Vec<SlotBatch> = Vec::with_capacity(slots.len());
        for &index in slots {
            let asked = Instant::now();
            let batch = loop {
                match stream.next(DATA_LOOK) {
                    Err(LoadError::Deadline { .. }) if asked.elapsed() < limit => {
                        group.abort.check()?;
                    }
                    Err(LoadError::Deadline { slot, .. }) => {
                        let n = self.n_late.get() + 1;
                        self.n_late.set(n);
                        let waited = asked.elapsed();
                        return Err(StepError::Late(LoadError::Deadline { slot, waited }, n));
                    }
                    found => break found?,
                }
            };
            assert_eq!(batch.slot, Slot { step: Step(step), index }, "the stream keeps its order");
            batches.push(batch);
        }
        self.n_late.set(0);
        let waited = started.elapsed();
        meter.data_wait += waited;
        self.shared.waited_for_data(waited);
        Ok(batches)
    }

    /// Computes this worker's slots, sums over the group, and applies what comes out: again with
    /// other exponents after an overflow, and where the step only measured.
    fn compute_step(
        &mut self,
        group: &mut Membership,
        batches: &[SlotBatch],
        math: &mut StepMath,
        deadline: Duration,
        meter: &mut Meter,
    ) -> Result<Summary, StepError> {
        // Other exponents count from the step that is applied with them: until then a group that
        // forms anew starts from the state as it was.
        let mut counters = self.counters.clone().expect("there is a state");
        let step = counters.step;
        let (reduction, n_slots) = (self.job.reduction(), self.job.spec.n_slots());
        loop {
            self.shared.enter(step, Phase::Compute);
            math.begin(self.engine.as_mut(), &counters.exponents)?;
            let suspects = self.compute(group, batches, math, deadline)?;
            self.raised_save = self.raise_requests(math);
            self.shared.enter(step, Phase::Reduce);
            math.reduce(self.engine.as_mut(), group.comm.as_mut(), deadline)?;
            self.shared.enter(step, Phase::Optimizer);
            match math.finish(self.engine.as_mut(), group.plan.world())? {
                Verdict::Redo => {
                    let overflows = math.overflows();
                    if reduction.at_floor(&counters, &overflows) {
                        let detail = "gradients overflow the largest sums there are".to_string();
                        return Err(StepError::NonFinite { n: 1, step, detail });
                    }
                    reduction.back_off(&mut counters, &overflows);
                    meter.redone += 1;
                }
                Verdict::Skip(summary) => {
                    // Exponents stay as they were: others counted for tries that nobody applied.
                    let mut counters = self.counters.clone().expect("there is a state");
                    counters.step += 1;
                    counters.non_finite += 1;
                    counters.non_finite_in_row += 1;
                    let n = counters.non_finite_in_row;
                    self.counters = Some(counters);
                    warn!(step, samples = ?suspects, "gradient not finite; step skipped");
                    if n >= self.job.spec.train.max_nonfinite_steps {
                        let detail = suspects.join("; ");
                        return Err(StepError::NonFinite { n, step, detail });
                    }
                    return Ok(summary);
                }
                Verdict::Apply(summary) if reduction.measures_first(&counters) => {
                    reduction.advance(&mut counters, &summary.max_abs, n_slots);
                    meter.redone += 1;
                }
                Verdict::Apply(summary) => {
                    let update = self.job.update(step, counters.updates + 1);
                    math.apply(self.engine.as_mut(), &update)?;
                    counters.step += 1;
                    counters.updates += 1;
                    counters.non_finite_in_row = 0;
                    reduction.advance(&mut counters, &summary.max_abs, n_slots);
                    self.counters = Some(counters);
                    return Ok(summary);
                }
            }
        }
    }

    /// Computes this worker's slots; returns the samples of those whose loss is not finite.
    fn compute(
        &mut self,
        group: &mut Membership,
        batches: &[SlotBatch],
        math: &mut StepMath,
        deadline: Duration,
    ) -> Result<Vec<String>, StepError> {
        let mut suspects: Vec<String> = Vec::new();
        for (idx, batch) in batches.iter().enumerate() {
            if group.abort.reason().is_some() {
                group.abort.check()?;
            }
            let engine = self.engine.as_mut();
            let (loss, took) = if idx + 1 < batches.len() {
                math.slot(engine, batch)?
            } else {
                math.last_slot(engine, batch, group.comm.as_mut(), deadline)?
            };
            self.shared.slot_took(took);
            if !loss.is_finite() {
                suspects.push(describe_samples(batch));
            }
        }
        Ok(suspects)
    }

    /// Raises the lanes that are asked for; returns the checkpoint attempt among them, 0 for none.
    fn raise_requests(&self, math: &mut StepMath) -> u64 {
        let mut save = 0;
        for (request, cell) in
            [(Request::Stop, &self.shared.stop), (Request::Checkpoint, &self.shared.save)]
        {
            let id = cell.load(Ordering::Acquire);
            if id > 0 {
                math.raise(request, id);
            }
            if request == Request::Checkpoint {
                save = id;
            }
        }
        save
    }

    /// Does what a step that was applied asks for: copies a checkpoint aside, draws, reports.
    fn after_step(
        &mut self,
        group: &Membership,
        summary: &Summary,
        meter: &mut Meter,
    ) -> Result<(), StepError> {
        let counters = self.counters.as_ref().expect("there is a state");
        let step = counters.step;
        if summary.checkpoint {
            // The one that the step carried: a newer one may be asked for by now.
            let raised = self.raised_save;
            let lower =
                self.shared.save.compare_exchange(raised, 0, Ordering::AcqRel, Ordering::Relaxed);
            if lower.is_ok() {
                self.save(group, AttemptSeq(raised), false);
            }
        }
        self.draw(group.rank, step == self.job.resolved.total_steps);
        self.mark(group, summary, meter)
    }

    /// Reports the step where that is due, with a digest where that is.
    fn mark(
        &mut self,
        group: &Membership,
        summary: &Summary,
        meter: &mut Meter,
    ) -> Result<(), StepError> {
        let (spec, step) = (&self.job.spec, self.step());
        let due = step.is_multiple_of(spec.train.digest_every);
        let digest = if due { Some(self.digest()?) } else { None };
        let last = step == self.job.resolved.total_steps || summary.stop;
        if last {
            self.metrics.iter().for_each(MetricsFile::write);
        }
        if !(due || last || self.job.track.is_due(step, meter.since.elapsed())) {
            return Ok(());
        }
        let counters = self.counters.as_ref().expect("there is a state");
        let seconds = meter.since.elapsed().as_secs_f64().max(1e-9);
        let images = meter.steps * u64::from(spec.train.batch);
        let images_per_second = images as f64 / seconds;
        let memory_bytes = memory_in_use(self.engine.as_ref());
        self.shared.uses_memory(memory_bytes);
        let mark = StepMark {
            generation: group.plan.generation,
            step: Step(step),
            loss: summary.loss,
            lr: self.job.resolved.schedule.lr(step - 1),
            grad_norm: summary.grad_norm,
            images_per_second,
            data_wait: meter.data_wait.as_secs_f64() / seconds,
            digest,
            skipped: counters.non_finite,
            redone: meter.redone,
            memory_bytes,
            mfu: self.yardstick.map(|y| mfu(&y, images_per_second, group.plan.members.len())),
        };
        (meter.since, meter.steps, meter.data_wait) = (Instant::now(), 0, Duration::ZERO);
        self.report(Report::Mark(mark));
        Ok(())
    }

    /// Draws what the model fills in, where that is due and this rank's.
    fn draw(&mut self, rank: usize, last: bool) {
        let step = self.step();
        let due = |gallery: &&mut Gallery| rank == 0 && gallery.is_due(step, last);
        let Some(gallery) = self.gallery.as_mut().filter(due) else { return };
        match gallery.draw(self.engine.as_mut(), step) {
            Ok(pictures) => self.shared.pictures.put(pictures),
            Err(err) => warn!(step, error = lacuna_checkpoint::chain(&err), "no pictures drawn"),
        }
    }

    /// Copies this rank's part aside and hands it to the saver.
    fn save(&mut self, group: &Membership, attempt: AttemptSeq, held: bool) {
        let generation = group.plan.generation;
        self.enter(Phase::Checkpoint);
        let began = Instant::now();
        let (digest, job) = match self.snapshot(&group.plan, group.rank, (attempt, held)) {
            Ok(taken) => taken,
            Err(err) => return self.fault(generation, FaultKind::Local, &err),
        };
        let (step, stall) = (job.info.step, began.elapsed());
        self.saver.meter.stalled(stall);
        info!(%generation, %step, %attempt, ?stall, "state copied for a checkpoint");
        self.report(Report::Snapshotted { generation, attempt, step, digest });
        if let Err(why) = self.saver.save(job) {
            let detail = why.to_string();
            self.report(Report::PartFailed { generation, attempt, detail });
        }
    }
}

fn group_of(
    job: &Job,
    plan: &Plan,
    rank: usize,
    comm_id: &[u8],
) -> Result<Group, Box<dyn std::error::Error>> {
    let mut members: Vec<std::net::SocketAddr> = Vec::new();
    for member in &plan.members {
        let addr = member.endpoint.parse();
        members.push(
            addr.map_err(|_| format!("endpoint `{}` of {}", member.endpoint, member.worker))?,
        );
    }
    let key = comm_id.try_into().map_err(|_| format!("a key of {} bytes", comm_id.len()))?;
    Ok(Group { run: job.run.clone(), generation: plan.generation, rank, members, key })
}

fn describe_samples(batch: &SlotBatch) -> String {
    let ids: Vec<String> = batch.samples.iter().map(ToString::to_string).collect();
    format!("slot {}: samples {}", batch.slot.index, ids.join(" "))
}
