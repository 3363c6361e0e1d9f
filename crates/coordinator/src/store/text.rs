//! A journal's records as they stand in the file: one JSON object each, its only key the kind.

use std::sync::Arc;

use lacuna_control::coordinator::Ending;
use lacuna_control::journal::Record;
use lacuna_control::plan::{CheckpointRef, Communicator, Member, Plan};
use lacuna_types::{AttemptSeq, Generation, Incarnation, NameError, SampleId, Step, WorkerId};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Text {
    Planned { generation: u64, members: Vec<MemberText>, keep: bool, why: String },
    Floor { generation: u64 },
    Started { generation: u64, resume_step: u64 },
    Change { number: u64 },
    Attempt { seq: u64 },
    AttemptClosed { seq: u64 },
    Distrusted,
    Over,
    Probe { probe: String },
    Checkpoint { step: u64, manifest: String },
    NoCheckpoint,
    SetAside { lost: CheckpointText, next: CheckpointText },
    CheckpointAsked,
    Stopping { why: String },
    Draining { worker: String, why: String },
    Gone { worker: String },
    Banned { worker: String, why: String },
    Released { worker: String },
    BadSamples { epoch: u32, samples: Vec<u64>, dropped: u64 },
    BadSamplesTold { epoch: u32, unlisted: u64 },
    Finished { step: u64, digest: String },
    Failed { why: String, code: u8 },
    Stopped { step: u64, why: String },
    Cancelled { why: String },
    Paused { why: String },
    Resumed,
}

#[derive(Serialize, Deserialize)]
struct CheckpointText {
    step: u64,
    manifest: String,
}

impl From<CheckpointRef> for CheckpointText {
    fn from(checkpoint: CheckpointRef) -> Self {
        CheckpointText { step: checkpoint.step.0, manifest: checkpoint.manifest }
    }
}

impl From<CheckpointText> for CheckpointRef {
    fn from(text: CheckpointText) -> Self {
        CheckpointRef { step: Step(text.step), manifest: text.manifest }
    }
}

#[derive(Serialize, Deserialize)]
struct MemberText {
    worker: String,
    incarnation: String,
    endpoint: String,
    slots: Vec<u32>,
}

/// Digests, probes and incarnations use all 64 bits, which JSON's readers do not keep.
fn hex(value: u64) -> String {
    format!("{value:016x}")
}

fn unhex(text: &str) -> Result<u64, String> {
    u64::from_str_radix(text, 16).map_err(|err| format!("`{text}`: {err}"))
}

fn worker(text: &str) -> Result<WorkerId, String> {
    text.parse().map_err(|err: NameError| err.to_string())
}

/// Renders a record.
pub(super) fn render(record: &Record) -> String {
    let text = match record.clone() {
        Record::Planned(plan) => Text::Planned {
            generation: plan.generation.0,
            members: plan.members.iter().map(member_to_text).collect(),
            keep: plan.communicator == Communicator::Keep,
            why: plan.why.clone(),
        },
        Record::Floor(generation) => Text::Floor { generation: generation.0 },
        Record::Started { generation, resume_step } => {
            Text::Started { generation: generation.0, resume_step: resume_step.0 }
        }
        Record::Change(number) => Text::Change { number },
        Record::Attempt(seq) => Text::Attempt { seq: seq.0 },
        Record::AttemptClosed(seq) => Text::AttemptClosed { seq: seq.0 },
        Record::Distrusted => Text::Distrusted,
        Record::Over => Text::Over,
        Record::Probe(probe) => Text::Probe { probe: hex(probe) },
        Record::Checkpoint(c) => Text::Checkpoint { step: c.step.0, manifest: c.manifest },
        Record::NoCheckpoint => Text::NoCheckpoint,
        Record::SetAside { lost, next } => Text::SetAside { lost: lost.into(), next: next.into() },
        Record::CheckpointAsked => Text::CheckpointAsked,
        Record::Stopping { why } => Text::Stopping { why },
        Record::Draining { worker, why } => Text::Draining { worker: worker.to_string(), why },
        Record::Gone(worker) => Text::Gone { worker: worker.to_string() },
        Record::Banned { worker, why } => Text::Banned { worker: worker.to_string(), why },
        Record::Released(worker) => Text::Released { worker: worker.to_string() },
        Record::BadSamples { epoch, samples, dropped } => {
            let samples = samples.into_iter().map(|sample| sample.0).collect();
            Text::BadSamples { epoch, samples, dropped }
        }
        Record::BadSamplesTold { epoch, unlisted } => Text::BadSamplesTold { epoch, unlisted },
        Record::Ended(Ending::Finished { step, digest }) => {
            Text::Finished { step: step.0, digest: hex(digest) }
        }
        Record::Ended(Ending::Failed { why, code }) => Text::Failed { why, code },
        Record::Ended(Ending::Stopped { step, why }) => Text::Stopped { step: step.0, why },
        Record::Ended(Ending::Cancelled { why }) => Text::Cancelled { why },
        Record::Ended(Ending::Paused { why }) => Text::Paused { why },
        Record::Resumed => Text::Resumed,
    };
    serde_json::to_string(&text).expect("plain structs are JSON")
}

/// Reads what [`render`] gave.
pub(super) fn parse(text: &str) -> Result<Record, String> {
    let text: Text = serde_json::from_str(text).map_err(|err| err.to_string())?;
    Ok(match text {
        Text::Planned { generation, members, keep, why } => Record::Planned(Arc::new(Plan {
            generation: Generation(generation),
            members: members.into_iter().map(member_from_text).collect::<Result<_, _>>()?,
            communicator: if keep { Communicator::Keep } else { Communicator::New },
            why,
        })),
        Text::Floor { generation } => Record::Floor(Generation(generation)),
        Text::Started { generation, resume_step } => {
            Record::Started { generation: Generation(generation), resume_step: Step(resume_step) }
        }
        Text::Change { number } => Record::Change(number),
        Text::Attempt { seq } => Record::Attempt(AttemptSeq(seq)),
        Text::AttemptClosed { seq } => Record::AttemptClosed(AttemptSeq(seq)),
        Text::Distrusted => Record::Distrusted,
        Text::Over => Record::Over,
        Text::Probe { probe } => Record::Probe(unhex(&probe)?),
        Text::Checkpoint { step, manifest } => {
            Record::Checkpoint(CheckpointRef { step: Step(step), manifest })
        }
        Text::NoCheckpoint => Record::NoCheckpoint,
        Text::SetAside { lost, next } => Record::SetAside { lost: lost.into(), next: next.into() },
        Text::CheckpointAsked => Record::CheckpointAsked,
        Text::Stopping { why } => Record::Stopping { why },
        Text::Draining { worker: name, why } => Record::Draining { worker: worker(&name)?, why },
        Text::Gone { worker: name } => Record::Gone(worker(&name)?),
        Text::Banned { worker: name, why } => Record::Banned { worker: worker(&name)?, why },
        Text::Released { worker: name } => Record::Released(worker(&name)?),
        Text::BadSamples { epoch, samples, dropped } => {
            let samples = samples.into_iter().map(SampleId).collect();
            Record::BadSamples { epoch, samples, dropped }
        }
        Text::BadSamplesTold { epoch, unlisted } => Record::BadSamplesTold { epoch, unlisted },
        Text::Finished { step, digest } => {
            Record::Ended(Ending::Finished { step: Step(step), digest: unhex(&digest)? })
        }
        Text::Failed { why, code } => Record::Ended(Ending::Failed { why, code }),
        Text::Stopped { step, why } => Record::Ended(Ending::Stopped { step: Step(step), why }),
        Text::Cancelled { why } => Record::Ended(Ending::Cancelled { why }),
        Text::Paused { why } => Record::Ended(Ending::Paused { why }),
        Text::Resumed => Record::Resumed,
    })
}

fn member_to_text(member: &Member) -> MemberText {
    MemberText {
        worker: member.worker.to_string(),
        incarnation: hex(member.incarnation.0),
        endpoint: member.endpoint.clone(),
        slots: member.slots.clone(),
    }
}

fn member_from_text(member: MemberText) -> Result<Member, String> {
    Ok(Member {
        worker: worker(&member.worker)?,
        incarnation: Incarnation(unhex(&member.incarnation)?),
        endpoint: member.endpoint,
        slots: member.slots,
    })
}
