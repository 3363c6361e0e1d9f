//! Between generated types and the words of `control`.

use std::sync::Arc;

use lacuna_control::coordinator::Hello;
use lacuna_control::message::{
    BadSample, BadSamples, Beat, FaultKind, Phase, StepMark, ToCoordinator, ToWorker,
};
use lacuna_control::plan::{Communicator, Member, Origin, Plan, Sync};
use lacuna_types::{AttemptSeq, BuildId, Generation, Incarnation, NameError, SampleId, Step};
use prost::Message as _;

use crate::v1;

/// A message from the wire that means nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field that must be there is not.
    #[error("message without `{0}`")]
    Missing(&'static str),
    /// A name cannot be used.
    #[error(transparent)]
    Name(#[from] NameError),
    /// An enumeration has a value that this build does not know.
    #[error("`{field}` has the unknown value {value}")]
    Unknown {
        /// Name of the field.
        field: &'static str,
        /// What it holds.
        value: i32,
    },
    /// A message stands where it has no place.
    #[error("{0}")]
    Order(&'static str),
}

fn need<T>(field: Option<T>, name: &'static str) -> Result<T, WireError> {
    field.ok_or(WireError::Missing(name))
}

impl From<BuildId> for v1::BuildId {
    fn from(build: BuildId) -> Self {
        let BuildId { version, protocol, numerics } = build;
        v1::BuildId { version, protocol, numerics }
    }
}

impl From<v1::BuildId> for BuildId {
    fn from(build: v1::BuildId) -> Self {
        let v1::BuildId { version, protocol, numerics } = build;
        BuildId { version, protocol, numerics }
    }
}

/// Reads the part of a hello that the machine needs.
pub fn hello(hello: &v1::Hello) -> Result<Hello, WireError> {
    Ok(Hello {
        worker: hello.worker_id.parse()?,
        incarnation: Incarnation(hello.incarnation),
        endpoint: hello.endpoint.clone(),
        state: hello.state_step.map(Step),
        generation: Generation(hello.generation),
        up: hello.up,
    })
}

fn phase_to_wire(phase: Phase) -> v1::Phase {
    match phase {
        Phase::Idle => v1::Phase::Idle,
        Phase::Sync => v1::Phase::Sync,
        Phase::Data => v1::Phase::Data,
        Phase::Compute => v1::Phase::Compute,
        Phase::Reduce => v1::Phase::Reduce,
        Phase::Optimizer => v1::Phase::Optimizer,
        Phase::Checkpoint => v1::Phase::Checkpoint,
    }
}

fn phase_from_wire(value: i32) -> Result<Phase, WireError> {
    match v1::Phase::try_from(value) {
        Ok(v1::Phase::Idle) => Ok(Phase::Idle),
        Ok(v1::Phase::Sync) => Ok(Phase::Sync),
        Ok(v1::Phase::Data) => Ok(Phase::Data),
        Ok(v1::Phase::Compute) => Ok(Phase::Compute),
        Ok(v1::Phase::Reduce) => Ok(Phase::Reduce),
        Ok(v1::Phase::Optimizer) => Ok(Phase::Optimizer),
        Ok(v1::Phase::Checkpoint) => Ok(Phase::Checkpoint),
        Ok(v1::Phase::Unspecified) | Err(_) => Err(WireError::Unknown { field: "phase", value }),
    }
}

fn kind_to_wire(kind: FaultKind) -> v1::FaultKind {
    match kind {
        FaultKind::Communicator => v1::FaultKind::Communicator,
        FaultKind::Storage => v1::FaultKind::Storage,
        FaultKind::Outage => v1::FaultKind::Outage,
        FaultKind::Checkpoint => v1::FaultKind::Checkpoint,
        FaultKind::Run => v1::FaultKind::Run,
        FaultKind::Data => v1::FaultKind::Data,
        // The difference is the worker's own affair.
        FaultKind::Local | FaultKind::Unfit => v1::FaultKind::Local,
    }
}

fn kind_from_wire(value: i32) -> Result<FaultKind, WireError> {
    match v1::FaultKind::try_from(value) {
        Ok(v1::FaultKind::Communicator) => Ok(FaultKind::Communicator),
        Ok(v1::FaultKind::Storage) => Ok(FaultKind::Storage),
        Ok(v1::FaultKind::Outage) => Ok(FaultKind::Outage),
        Ok(v1::FaultKind::Checkpoint) => Ok(FaultKind::Checkpoint),
        Ok(v1::FaultKind::Run) => Ok(FaultKind::Run),
        Ok(v1::FaultKind::Data) => Ok(FaultKind::Data),
        Ok(v1::FaultKind::Local) => Ok(FaultKind::Local),
        Ok(v1::FaultKind::Unspecified) | Err(_) => Err(WireError::Unknown { field: "kind", value }),
    }
}

fn mark_to_wire(mark: StepMark) -> v1::StepMark {
    v1::StepMark {
        generation: mark.generation.0,
        step: mark.step.0,
        loss: mark.loss,
        lr: mark.lr,
        grad_norm: mark.grad_norm,
        images_per_second: mark.images_per_second,
        data_wait: mark.data_wait,
        digest: mark.digest,
        skipped: mark.skipped,
        redone: mark.redone,
        memory_bytes: mark.memory_bytes,
        mfu: mark.mfu,
    }
}

fn mark_from_wire(mark: v1::StepMark) -> StepMark {
    StepMark {
        generation: Generation(mark.generation),
        step: Step(mark.step),
        loss: mark.loss,
        lr: mark.lr,
        grad_norm: mark.grad_norm,
        images_per_second: mark.images_per_second,
        data_wait: mark.data_wait,
        digest: mark.digest,
        skipped: mark.skipped,
        redone: mark.redone,
        memory_bytes: mark.memory_bytes,
        mfu: mark.mfu,
    }
}

fn bad_samples_to_wire(report: BadSamples) -> v1::BadSamples {
    let sample = |bad: BadSample| v1::BadSample {
        step: bad.step.0,
        sample: bad.sample.0,
        key: bad.key,
        shard: bad.shard,
        offset: bad.offset,
        error: bad.error,
        stand_in: bad.stand_in.0,
    };
    let samples = report.samples.into_iter().map(sample).collect();
    v1::BadSamples { epoch: report.epoch, samples, dropped: report.dropped }
}

fn bad_samples_from_wire(report: v1::BadSamples) -> BadSamples {
    let sample = |bad: v1::BadSample| BadSample {
        step: Step(bad.step),
        sample: SampleId(bad.sample),
        key: bad.key,
        shard: bad.shard,
        offset: bad.offset,
        error: bad.error,
        stand_in: SampleId(bad.stand_in),
    };
    let samples = report.samples.into_iter().map(sample).collect();
    BadSamples { epoch: report.epoch, samples, dropped: report.dropped }
}

/// Puts a worker's message on the wire.
pub fn to_coordinator(message: ToCoordinator) -> v1::SessionRequest {
    use v1::session_request::Message as M;
    let message = match message {
        ToCoordinator::Beat(beat) => M::Beat(v1::Beat {
            generation: beat.generation.0,
            step: beat.step.0,
            phase: phase_to_wire(beat.phase).into(),
            phase_ms: beat.phase_ms,
            op_seq: beat.op_seq,
            in_op: beat.in_op,
            slot_us: beat.slot_us,
            data_us: beat.data_us,
            memory_bytes: beat.memory_bytes,
        }),
        ToCoordinator::Warm { probe } => M::Warm(v1::Warm { probe }),
        ToCoordinator::Prepared { generation, state, trained, kept } => M::Prepared(v1::Prepared {
            generation: generation.0,
            state_step: state.map(|step| step.0),
            kept,
            trained: trained.0,
        }),
        ToCoordinator::Synced { generation, step, digest } => {
            M::Synced(v1::Synced { generation: generation.0, step: step.0, digest })
        }
        ToCoordinator::Fault { generation, kind, suspects, detail } => M::Fault(v1::Fault {
            generation: generation.0,
            kind: kind_to_wire(kind).into(),
            detail,
            suspects: suspects.into_iter().map(|rank| rank as u32).collect(),
        }),
        ToCoordinator::Audited { generation, probe } => {
            M::Audited(v1::Audited { generation: generation.0, probe })
        }
        ToCoordinator::StepMark(mark) => M::StepMark(mark_to_wire(mark)),
        ToCoordinator::Held { generation, step, digest } => {
            M::Held(v1::Held { generation: generation.0, step: step.0, digest })
        }
        ToCoordinator::Snapshotted { generation, attempt, step, digest } => {
            M::Snapshotted(v1::Snapshotted {
                generation: generation.0,
                attempt: attempt.0,
                step: step.0,
                digest,
            })
        }
        ToCoordinator::PartDone { generation, attempt, receipt } => {
            M::PartDone(v1::PartDone { generation: generation.0, attempt: attempt.0, receipt })
        }
        ToCoordinator::PartFailed { generation, attempt, detail } => {
            M::PartFailed(v1::PartFailed { generation: generation.0, attempt: attempt.0, detail })
        }
        ToCoordinator::Leaving { why } => M::Leaving(v1::Leaving { why }),
        ToCoordinator::BadSamples(report) => M::BadSamples(bad_samples_to_wire(report)),
    };
    v1::SessionRequest { message: Some(message) }
}

/// Reads a worker's message; a hello is refused, it has its place at the start of a stream.
pub fn from_worker(request: v1::SessionRequest) -> Result<ToCoordinator, WireError> {
    use v1::session_request::Message as M;
    Ok(match need(request.message, "message")? {
        M::Hello(_) => return Err(WireError::Order("a second hello on one stream")),
        // Pictures are for people and not for a run's machine; a session keeps them.
        M::Picture(_) => return Err(WireError::Order("a picture before a run was given")),
        M::Beat(beat) => ToCoordinator::Beat(Beat {
            generation: Generation(beat.generation),
            step: Step(beat.step),
            phase: phase_from_wire(beat.phase)?,
            phase_ms: beat.phase_ms,
            op_seq: beat.op_seq,
            in_op: beat.in_op,
            slot_us: beat.slot_us,
            data_us: beat.data_us,
            memory_bytes: beat.memory_bytes,
        }),
        M::Warm(warm) => ToCoordinator::Warm { probe: warm.probe },
        M::Prepared(m) => ToCoordinator::Prepared {
            generation: Generation(m.generation),
            state: m.state_step.map(Step),
            trained: Generation(m.trained),
            kept: m.kept,
        },
        M::Synced(m) => ToCoordinator::Synced {
            generation: Generation(m.generation),
            step: Step(m.step),
            digest: m.digest,
        },
        M::Fault(m) => ToCoordinator::Fault {
            generation: Generation(m.generation),
            kind: kind_from_wire(m.kind)?,
            suspects: m.suspects.into_iter().map(|rank| rank as usize).collect(),
            detail: m.detail,
        },
        M::Audited(m) => {
            ToCoordinator::Audited { generation: Generation(m.generation), probe: m.probe }
        }
        M::StepMark(mark) => ToCoordinator::StepMark(mark_from_wire(mark)),
        M::Held(m) => ToCoordinator::Held {
            generation: Generation(m.generation),
            step: Step(m.step),
            digest: m.digest,
        },
        M::Snapshotted(m) => ToCoordinator::Snapshotted {
            generation: Generation(m.generation),
            attempt: AttemptSeq(m.attempt),
            step: Step(m.step),
            digest: m.digest,
        },
        M::PartDone(m) => ToCoordinator::PartDone {
            generation: Generation(m.generation),
            attempt: AttemptSeq(m.attempt),
            receipt: m.receipt,
        },
        M::PartFailed(m) => ToCoordinator::PartFailed {
            generation: Generation(m.generation),
            attempt: AttemptSeq(m.attempt),
            detail: m.detail,
        },
        M::Leaving(m) => ToCoordinator::Leaving { why: m.why },
        M::BadSamples(m) => ToCoordinator::BadSamples(bad_samples_from_wire(m)),
    })
}

/// Encodes a plan as it stands in a message to its members.
pub fn encode_plan(plan: &Plan) -> prost::bytes::Bytes {
    let member = |m: &Member| v1::Member {
        worker_id: m.worker.to_string(),
        incarnation: m.incarnation.0,
        endpoint: m.endpoint.clone(),
        slots: m.slots.clone(),
    };
    let communicator = match plan.communicator {
        Communicator::Keep => v1::Communicator::Keep,
        Communicator::New => v1::Communicator::New,
    };
    let plan = v1::Plan {
        generation: plan.generation.0,
        members: plan.members.iter().map(member).collect(),
        why: plan.why.clone(),
        communicator: communicator.into(),
    };
    plan.encode_to_vec().into()
}

/// Decodes what [`encode_plan`] gave.
pub fn decode_plan(bytes: &[u8]) -> Result<Plan, WireError> {
    let plan = v1::Plan::decode(bytes).map_err(|_| WireError::Missing("plan"))?;
    let member = |m: v1::Member| {
        Ok(Member {
            worker: m.worker_id.parse()?,
            incarnation: Incarnation(m.incarnation),
            endpoint: m.endpoint,
            slots: m.slots,
        })
    };
    let members = plan.members.into_iter().map(member).collect::<Result<Vec<_>, WireError>>()?;
    let communicator = match v1::Communicator::try_from(plan.communicator) {
        Ok(v1::Communicator::Keep) => Communicator::Keep,
        Ok(v1::Communicator::New) => Communicator::New,
        Ok(v1::Communicator::Unspecified) | Err(_) => {
            return Err(WireError::Unknown { field: "communicator", value: plan.communicator });
        }
    };
    Ok(Plan { generation: Generation(plan.generation), members, communicator, why: plan.why })
}

/// Puts an encoded plan into the message that makes its members prepare.
pub fn prepare(plan: prost::bytes::Bytes) -> v1::SessionResponse {
    let message = v1::session_response::Message::Prepare(v1::Prepare { plan });
    v1::SessionResponse { message: Some(message) }
}

fn sync_to_wire(sync: Sync) -> v1::Sync {
    use v1::sync::{Checkpoint, Memory, Origin as O, Seed};
    let origin = match sync.origin {
        Origin::Seed => O::Seed(Seed {}),
        Origin::Checkpoint { manifest } => O::Checkpoint(Checkpoint { manifest }),
        Origin::Memory { source, healed } => O::Memory(Memory {
            source: source as u32,
            healed: healed.into_iter().map(|rank| rank as u32).collect(),
        }),
    };
    v1::Sync { resume_step: sync.resume_step.0, origin: Some(origin) }
}

fn sync_from_wire(sync: v1::Sync) -> Result<Sync, WireError> {
    use v1::sync::Origin as O;
    let origin = match need(sync.origin, "sync.origin")? {
        O::Seed(_) => Origin::Seed,
        O::Checkpoint(m) => Origin::Checkpoint { manifest: m.manifest },
        O::Memory(m) => Origin::Memory {
            source: m.source as usize,
            healed: m.healed.into_iter().map(|rank| rank as usize).collect(),
        },
    };
    Ok(Sync { resume_step: Step(sync.resume_step), origin })
}

/// Puts a message for a worker on the wire.
pub fn to_worker(message: ToWorker) -> v1::SessionResponse {
    use v1::session_response::Message as M;
    let message = match message {
        ToWorker::Prepare(plan) => return prepare(encode_plan(&plan)),
        ToWorker::Audit { generation } => M::Audit(v1::Audit { generation: generation.0 }),
        ToWorker::Connect { generation, comm_id, sync } => M::Connect(v1::Connect {
            generation: generation.0,
            comm_id,
            sync: Some(sync_to_wire(sync)),
        }),
        ToWorker::Start { generation, resume_step } => {
            M::Start(v1::Start { generation: generation.0, resume_step: resume_step.0 })
        }
        ToWorker::Revoke { generation, why } => {
            M::Revoke(v1::Revoke { generation: generation.0, why })
        }
        ToWorker::Hold { generation, change, why } => {
            M::Hold(v1::Hold { generation: generation.0, change, why })
        }
        ToWorker::Propose { generation, attempt, held } => {
            M::Propose(v1::Propose { generation: generation.0, attempt: attempt.0, held })
        }
        ToWorker::AbortAttempt { generation, attempt, why } => {
            M::AbortAttempt(v1::AbortAttempt { generation: generation.0, attempt: attempt.0, why })
        }
        ToWorker::Committed { step, manifest } => {
            M::Committed(v1::Committed { step: step.0, manifest })
        }
        ToWorker::Exit { code, why } => M::Exit(v1::Exit { code: code.into(), why }),
        ToWorker::Stale { current } => M::Stale(v1::Stale { generation: current.0 }),
    };
    v1::SessionResponse { message: Some(message) }
}

/// Reads a message for a worker; a welcome is refused, it has its place at the start of a stream.
pub fn from_coordinator(response: v1::SessionResponse) -> Result<ToWorker, WireError> {
    use v1::session_response::Message as M;
    Ok(match need(response.message, "message")? {
        M::Welcome(_) => return Err(WireError::Order("a second welcome on one stream")),
        M::Prepare(m) => ToWorker::Prepare(Arc::new(decode_plan(&m.plan)?)),
        M::Audit(m) => ToWorker::Audit { generation: Generation(m.generation) },
        M::Connect(m) => ToWorker::Connect {
            generation: Generation(m.generation),
            comm_id: m.comm_id,
            sync: sync_from_wire(need(m.sync, "sync")?)?,
        },
        M::Start(m) => ToWorker::Start {
            generation: Generation(m.generation),
            resume_step: Step(m.resume_step),
        },
        M::Revoke(m) => ToWorker::Revoke { generation: Generation(m.generation), why: m.why },
        M::Hold(m) => {
            ToWorker::Hold { generation: Generation(m.generation), change: m.change, why: m.why }
        }
        M::Propose(m) => ToWorker::Propose {
            generation: Generation(m.generation),
            attempt: AttemptSeq(m.attempt),
            held: m.held,
        },
        M::AbortAttempt(m) => ToWorker::AbortAttempt {
            generation: Generation(m.generation),
            attempt: AttemptSeq(m.attempt),
            why: m.why,
        },
        M::Committed(m) => ToWorker::Committed { step: Step(m.step), manifest: m.manifest },
        M::Exit(m) => ToWorker::Exit { code: u8::try_from(m.code).unwrap_or(1), why: m.why },
        M::Stale(m) => ToWorker::Stale { current: Generation(m.generation) },
    })
}

#[cfg(test)]
mod tests;
