//! Parts of checkpoints, and marks: what a step loop says of a state.

use lacuna_control::message::StepMark;
use lacuna_control::worker::Report;
use lacuna_types::{AttemptSeq, Generation, Step};

use crate::catalogue::{Disk, Part};
use crate::digest::State;
use crate::setup::MS;
use crate::world::{Ev, Pid, World};

/// A part on its way to the disk.
#[derive(Clone, Debug)]
pub struct PartJob {
    generation: Generation,
    attempt: AttemptSeq,
    part: Part,
}

impl World {
    pub(crate) fn save(&mut self, pid: Pid, attempt: AttemptSeq) {
        let generation = self.generation_of(pid);
        let step_loop = &self.procs[pid].step_loop;
        let Some(state) = step_loop.state else { return };
        let (_, rank) = step_loop.comm.expect("a member is in a communicator");
        let world = step_loop.plan.as_ref().map_or(0, |(plan, _)| plan.world());
        let extra = match self.procs[pid].disk {
            Disk::Slow(ms) => ms * MS,
            _ => 0,
        };
        self.counts.parts += 1;
        let after = self.setup.part_ms * MS * self.rng.range(50, 300) / 100 + extra;
        let writer = (self.procs[pid].worker.clone(), self.procs[pid].incarnation);
        let part = Part { writer, state, rank, world };
        let job = PartJob { generation, attempt, part };
        self.later(after, Ev::Part { pid, job: Box::new(job) });
        let (step, digest) = (Step(state.step), state.digest);
        self.report(pid, Report::Snapshotted { generation, attempt, step, digest });
    }

    pub(crate) fn on_part(&mut self, pid: Pid, job: PartJob) {
        let PartJob { generation, attempt, part } = job;
        if self.procs[pid].disk == Disk::Full {
            let detail = "no space left on device".to_string();
            self.report(pid, Report::PartFailed { generation, attempt, detail });
            return;
        }
        let step = part.state.step;
        let receipt = format!("{step}/{generation}-{attempt}/{}of{}", part.rank, part.world);
        self.store.parts.insert(receipt.clone(), part);
        self.report(pid, Report::PartDone { generation, attempt, receipt });
    }
}

/// Makes the mark of a state, with its digest if that is due.
pub(crate) fn mark(generation: Generation, state: &State, due: bool) -> StepMark {
    StepMark {
        generation,
        step: Step(state.step),
        loss: 1.0,
        lr: 0.1,
        grad_norm: 1.0,
        images_per_second: 1.0,
        data_wait: 0.0,
        digest: due.then_some(state.digest),
        memory_bytes: 0,
        mfu: None,
        skipped: 0,
        redone: 0,
    }
}
