//! Faults, drawn and done.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use lacuna_api::client::Client;
use rustix::process::Signal;

use super::Row;
use crate::dice::Dice;
use crate::history::{Heard, History};
use crate::proxy::{Order, Way};
use crate::rig::{Node, Rig};

/// Longest wait for the moment of a fault; past it, the fault comes anyway.
const PATIENCE: Duration = Duration::from_secs(8);
/// Longest wait for a drained agent: its trainer leaves at a boundary, after the gap between two
/// voluntary changes.
const DRAIN: Duration = Duration::from_secs(40);
/// Bounds of what the lease (3 s) forgives, and of what it does not, in milliseconds.
const SHORT: (u64, u64) = (200, 2200);
const LONG: (u64, u64) = (3600, 5000);
/// Bounds of a time in which a group must not stand still unnoticed, in milliseconds.
const HANG: (u64, u64) = (8000, 20_000);

/// Does faults to a rig and remembers them.
pub(super) struct Injector<'r, 'b> {
    pub rig: &'r mut Rig<'b>,
    pub history: &'r History,
    pub run: String,
    pub dice: Dice,
    /// Workers at the start.
    pub world: usize,
    /// Faults so far, for reports.
    pub done: Vec<String>,
    /// What went wrong besides the run.
    pub problems: Vec<String>,
    pub joined: usize,
}

impl Injector<'_, '_> {
    /// Does up to `n` faults of a row, the last before step `until`.
    pub fn run(&mut self, row: Row, n: usize, until: u64) -> anyhow::Result<()> {
        for _ in 0..n {
            if !self.await_moment(until) {
                break;
            }
            self.fault(row)?;
            self.rig.mend()?;
            if row == Row::Kills {
                self.restore_nodes()?;
            }
        }
        self.restore_nodes()
    }

    /// Waits for some steps from here; `false` once the run is over or past `until`.
    fn await_moment(&mut self, until: u64) -> bool {
        let at = self.history.look(Heard::step) + 2 + self.dice.below(40) as u64;
        // Not getting there in time is no reason to wait with the next fault.
        let _ = self.history.until(PATIENCE, |heard| (heard.step() >= at).then_some(()));
        self.history.look(|heard| heard.run.exit_code.is_none() && heard.step() < until)
    }

    fn rest(&self, time: Duration) {
        // Ends early with the run.
        let _ = self.history.until(time, |_| None::<()>);
    }

    fn note(&mut self, text: String) {
        let step = self.history.look(Heard::step);
        self.done.push(format!("at step {step}: {text}"));
    }

    fn fault(&mut self, row: Row) -> anyhow::Result<()> {
        match row {
            Row::Quiet => Ok(()),
            Row::Kills => self.kill(),
            Row::Coordinator => self.coordinator(),
            Row::JoinDrain => self.join_or_drain(),
            Row::Stops => self.stop(),
            Row::Partitions => self.partition(),
            Row::Hangs => self.hang(),
            Row::Mixed => {
                let rows =
                    [Row::Kills, Row::Coordinator, Row::JoinDrain, Row::Stops, Row::Partitions];
                let row = rows[self.dice.below(rows.len())];
                self.fault(row)
            }
        }
    }

    fn some_node(&mut self) -> Option<String> {
        self.dice.pick(&self.rig.node_names()).cloned()
    }

    /// Kills a trainer or an agent, now and then as a checkpoint starts, and now and then another
    /// one while the group forms again or heals.
    fn kill(&mut self) -> anyhow::Result<()> {
        if self.dice.chance(0.3) {
            self.ask_for_checkpoint()?;
            let pause = self.dice.millis(0, 60);
            self.rest(pause);
        }
        self.kill_one()?;
        if self.dice.chance(0.4) {
            let word = if self.dice.chance(0.5) { "forming" } else { "syncing" };
            let here = self.history.look(|heard| heard.run.generation);
            let reached = |heard: &Heard| heard.run.state == word && heard.run.generation > here;
            let seen = self.history.until(PATIENCE / 2, |heard| reached(heard).then_some(()));
            self.note(format!("while {word}: {}", if seen.is_some() { "seen" } else { "missed" }));
            self.kill_one()?;
        }
        Ok(())
    }

    fn kill_one(&mut self) -> anyhow::Result<()> {
        let Some(name) = self.some_node() else { return Ok(()) };
        if self.dice.chance(0.2) {
            self.note(format!("SIGKILL to agent {name}"));
            drop(self.rig.take(&name));
        } else {
            let there = self.rig.signal_trainer(&name, Signal::KILL);
            self.note(format!("SIGKILL to the trainer of {name} (there: {there})"));
        }
        Ok(())
    }

    /// Starts agents again that were killed or drained.
    fn restore_nodes(&mut self) -> anyhow::Result<()> {
        for k in 0..self.world {
            let name = node_name(k);
            if self.rig.node(&name).is_none() {
                self.rig.add(&name)?;
            }
        }
        Ok(())
    }

    fn ask_for_checkpoint(&mut self) -> anyhow::Result<()> {
        self.note("checkpoint asked for".into());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut client = Client::connect(&self.rig.url(), PATIENCE).await?;
            client.request_checkpoint(&self.run).await
        })?;
        Ok(())
    }

    fn coordinator(&mut self) -> anyhow::Result<()> {
        if self.dice.chance(0.6) {
            let down = self.dice.millis(0, 3000);
            self.note(format!("SIGKILL to the coordinator, back after {down:?}"));
            self.rig.kill_coordinator();
            self.rest(down);
            self.rig.start_coordinator()
        } else {
            let time = self.duration();
            self.note(format!("coordinator stopped for {time:?}"));
            self.rig.signal_coordinator(Signal::STOP);
            self.rest(time);
            self.rig.signal_coordinator(Signal::CONT);
            Ok(())
        }
    }

    /// A time on one side of the lease or the other.
    fn duration(&mut self) -> Duration {
        let (from, to) = if self.dice.chance(0.5) { SHORT } else { LONG };
        self.dice.millis(from, to)
    }

    fn join_or_drain(&mut self) -> anyhow::Result<()> {
        let names = self.rig.node_names();
        let most = self.world + 1;
        let drains = names.len() >= most || (names.len() > 1 && self.dice.chance(0.5));
        if !drains {
            self.joined += 1;
            let name = format!("j{}", self.joined);
            self.note(format!("{name} joins"));
            return self.rig.add(&name);
        }
        let name = self.some_node().context("there is a node")?;
        self.note(format!("{name} is drained"));
        let node = self.rig.take(&name).context("it was there")?;
        self.await_drained(&name, node)
    }

    fn await_drained(&mut self, name: &str, mut node: Node) -> anyhow::Result<()> {
        let started = Instant::now();
        node.agent.signal(Signal::TERM);
        let code = node.agent.wait(DRAIN)?.map(|status| status.code());
        match code {
            Some(Some(0 | 75)) => self.note(format!("{name} left after {:?}", started.elapsed())),
            Some(code) => self.problems.push(format!("drained agent {name} ended with {code:?}")),
            None => self.problems.push(format!("drained agent {name} did not end in {DRAIN:?}")),
        }
        Ok(())
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        let Some(name) = self.some_node() else { return Ok(()) };
        let time = self.duration();
        let there = self.rig.signal_trainer(&name, Signal::STOP);
        self.note(format!("trainer of {name} stopped for {time:?} (there: {there})"));
        self.rest(time);
        self.rig.signal_trainer(&name, Signal::CONT);
        Ok(())
    }

    /// Parts a node from its peers while it talks to the coordinator.
    fn hang(&mut self) -> anyhow::Result<()> {
        let Some(name) = self.some_node() else { return Ok(()) };
        let time = self.dice.millis(HANG.0, HANG.1);
        let Some(node) = self.rig.node(&name) else { return Ok(()) };
        node.mesh.obey(Order::Cut(Way::Both));
        self.note(format!("peers' connections to {name} cut for {time:?}"));
        self.rest(time);
        Ok(())
    }

    fn partition(&mut self) -> anyhow::Result<()> {
        let Some(name) = self.some_node() else { return Ok(()) };
        let time = self.duration();
        let Some(node) = self.rig.node(&name) else { return Ok(()) };
        let way = [Way::Both, Way::Up, Way::Down][self.dice.below(3)];
        let text = match self.dice.below(6) {
            0 | 1 => {
                node.control.obey(Order::Cut(way));
                format!("{name} and the coordinator cut ({way:?})")
            }
            2 => {
                node.mesh.obey(Order::Cut(way));
                format!("peers' connections to {name} cut ({way:?})")
            }
            3 => {
                node.control.obey(Order::Cut(Way::Both));
                node.mesh.obey(Order::Cut(Way::Both));
                format!("cable of {name} pulled")
            }
            4 => {
                node.mesh.obey(Order::Delay(Duration::from_millis(15)));
                node.control.obey(Order::Delay(Duration::from_millis(150)));
                format!("network of {name} slow")
            }
            _ => {
                node.mesh.obey(Order::Reset);
                node.control.obey(Order::Reset);
                format!("connections of {name} reset")
            }
        };
        self.note(format!("{text} for {time:?}"));
        self.rest(time);
        Ok(())
    }
}

/// Returns the name of the `k`-th node that a rig starts with.
pub(super) fn node_name(k: usize) -> String {
    format!("n{k}")
}
