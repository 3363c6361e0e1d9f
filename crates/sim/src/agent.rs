//! Agents: one a node. They start trainers, see them end, say so, and start them again.

use lacuna_control::coordinator;
use lacuna_types::{Incarnation, WorkerId};

use crate::net::COORDINATOR;
use crate::process::starts_again;
use crate::setup::MS;
use crate::world::{Ev, Pid, World};

/// First and longest pause before a trainer is started again.
const BACK_OFF: (u64, u64) = (200 * MS, 30_000 * MS);
/// A trainer that lived this long was healthy.
const HEALTHY: u64 = 30_000 * MS;
/// Pause of an agent that cannot reach the coordinator.
const RETRY: u64 = 700 * MS;

/// An agent's node.
#[derive(Debug)]
pub struct Agent {
    /// Name of the node.
    pub name: String,
    /// Whether the agent runs.
    pub alive: bool,
    /// Counts its lives.
    pub life: u64,
    /// Whether it starts trainers again.
    pub respawns: bool,
    /// Probe of the trainers that it starts.
    pub probe: u64,
    /// Whether its devices work.
    pub works: bool,
    /// Workers that it watches: name, its pause, when it started last.
    pub devices: Vec<(WorkerId, u64, u64)>,
}

/// Splits `node:device`.
fn node_name(worker: &str) -> &str {
    worker.split_once(':').map_or(worker, |(node, _)| node)
}

impl World {
    /// Returns the place of a node by the name of it or of one of its workers.
    pub(crate) fn node(&mut self, name: &str) -> usize {
        let name = node_name(name);
        if name == "coordinator" {
            return COORDINATOR;
        }
        if let Some(at) = self.agents.iter().position(|a| a.name == name) {
            return at + 1;
        }
        self.agents.push(Agent {
            name: name.to_string(),
            alive: false,
            life: 0,
            respawns: true,
            probe: 7,
            works: true,
            devices: Vec::new(),
        });
        self.agents.len()
    }

    /// Starts a worker's agent if it does not run, and a trainer if there is none.
    pub(crate) fn spawn(&mut self, worker: &WorkerId) {
        let node = self.node(worker.as_str());
        let now = self.now;
        let agent = &mut self.agents[node - 1];
        if !agent.alive {
            agent.alive = true;
            agent.life += 1;
        }
        agent.devices.retain(|(known, ..)| known != worker);
        agent.devices.push((worker.clone(), BACK_OFF.0, now));
        let probe = agent.probe;
        // An agent that starts again starts all that it had.
        let all: Vec<WorkerId> = agent.devices.iter().map(|(known, ..)| known.clone()).collect();
        for worker in all {
            let own = |pid: &Pid| self.procs[*pid].node == node;
            if !self.lives(worker.as_str()).iter().any(own) {
                self.start_process(node, &worker, probe);
            }
        }
    }

    /// Another agent starts a trainer of the same name.
    pub(crate) fn spawn_twin(&mut self, worker: &WorkerId) {
        let node = self.node(&format!("twin-of-{}", node_name(worker.as_str())));
        let pid = self.start_process(node, worker, 7);
        self.procs[pid].unwatched = true;
    }

    /// The agent dies, and its trainers with it, at the latest when they read from its pipe.
    pub(crate) fn end_agent(&mut self, node: usize, silently: bool) {
        let agent = &mut self.agents[node - 1];
        agent.alive = false;
        agent.life += 1;
        for pid in 0..self.procs.len() {
            if self.procs[pid].alive && self.procs[pid].node == node {
                self.end_process(pid, None, silently);
            }
        }
    }

    /// An agent sees one of its trainers end.
    pub(crate) fn agent_saw_exit(&mut self, pid: Pid, code: Option<u8>) {
        let process = &self.procs[pid];
        let (node, worker, incarnation) =
            (process.node, process.worker.clone(), process.incarnation);
        let agent = &mut self.agents[node - 1];
        if !agent.alive {
            return;
        }
        let how = if code.is_some() { "exited" } else { "killed by signal 9" };
        let life = agent.life;
        let again = agent.respawns && starts_again(code);
        let now = self.now;
        let device = agent.devices.iter_mut().find(|(known, ..)| *known == worker);
        let pause = match device {
            Some((_, pause, started)) if again => {
                if now - *started > HEALTHY {
                    *pause = BACK_OFF.0;
                }
                let this = *pause;
                *pause = (*pause * 2).min(BACK_OFF.1);
                Some(this)
            }
            _ => None,
        };
        if pause.is_none() {
            agent.devices.retain(|(known, ..)| *known != worker);
        }
        let after = self.latency();
        self.later(after, Ev::Exited { node, worker: worker.clone(), incarnation, how });
        if let Some(pause) = pause {
            self.later(pause, Ev::Respawn { node, life, worker });
        }
    }

    pub(crate) fn on_respawn(&mut self, node: usize, life: u64, worker: WorkerId) {
        let now = self.now;
        let agent = &mut self.agents[node - 1];
        if !agent.alive || agent.life != life {
            return;
        }
        let Some(device) = agent.devices.iter_mut().find(|(known, ..)| *known == worker) else {
            return;
        };
        device.2 = now;
        let probe = agent.probe;
        let own = |pid: &Pid| self.procs[*pid].node == node;
        if !self.lives(worker.as_str()).iter().any(own) {
            self.start_process(node, &worker, probe);
        }
    }

    /// The coordinator has an agent kill one life of a worker.
    pub(crate) fn on_kill(&mut self, worker: &WorkerId, incarnation: Incarnation) {
        let life = |p: &crate::process::Process| {
            p.alive && p.incarnation == incarnation && p.worker == *worker
        };
        let Some(pid) = self.procs.iter().position(life) else { return };
        let node = self.procs[pid].node;
        let agent = &self.agents[node - 1];
        if agent.alive && !self.procs[pid].unwatched && !self.net.is_cut(COORDINATOR, node) {
            self.say(|| format!("the agent kills {worker}"));
            self.end_process(pid, None, false);
        }
    }

    /// An agent's report arrives, or the agent tries again.
    pub(crate) fn on_exit_report(
        &mut self,
        node: usize,
        worker: WorkerId,
        incarnation: Incarnation,
        how: &'static str,
    ) {
        if !self.agents[node - 1].alive {
            return;
        }
        if !self.host.is_up() || self.net.is_cut(node, COORDINATOR) {
            self.later(RETRY, Ev::Exited { node, worker, incarnation, how });
            return;
        }
        self.host_left(&worker, incarnation);
        let how = how.to_string();
        let incarnation = Some(incarnation);
        self.host_input(coordinator::Event::TrainerExited { worker, incarnation, how });
    }
}
