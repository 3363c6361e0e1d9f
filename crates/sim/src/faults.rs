//! Doing to the cluster what an action says.

use lacuna_control::coordinator::{Ending, Event};
use lacuna_control::worker;
use lacuna_types::WorkerId;

use crate::action::Action;
use crate::catalogue::Disk;
use crate::setup::MS;
use crate::world::{Ev, Pid, World};

/// Times that a run may give up after everything was repaired: what came before still counts
/// against it.
const EXCUSES: u32 = 2;
/// How often an operator looks.
const TEND: u64 = 2_000 * MS;

fn id(name: &str) -> WorkerId {
    name.parse().expect("names were checked when they were read")
}

impl World {
    fn is_waiting(&self) -> bool {
        self.host.machine.as_ref().is_some_and(|machine| machine.state_word() == "waiting")
    }

    /// Does it, at once.
    pub fn perform(&mut self, action: &Action) {
        use Action as A;
        self.say(|| format!("> {action}"));
        self.harmed |= !action.is_harmless() || self.setup.poison > 0;
        // With slow messages a stream may take longer to come back than its grace is.
        let slow = self.setup.latency_ms > 20 && !action.is_harmless();
        // Nor an operator nor a clock that jumps waits for silent members with the newest state.
        let hurries = matches!(action, A::Rest | A::Cancel | A::Force | A::Jump(..));
        let impatient = self.harmed && hurries && self.is_waiting();
        self.rough |= !action.is_gentle() || slow || self.setup.poison > 0 || impatient;
        match action {
            A::Spawn(w) => self.spawn(&id(w)),
            A::Twin(w) => self.spawn_twin(&id(w)),
            A::Kill(w) => self.each(w, |world, pid| world.end_process(pid, None, false)),
            A::Fail(w) => self.each(w, |world, pid| {
                world.end_process(pid, Some(lacuna_types::exit::FAILED), false);
            }),
            A::KillAgent(n) => {
                let node = self.node(n);
                self.end_agent(node, false);
            }
            A::Lose(n) => {
                let node = self.node(n);
                self.end_agent(node, true);
            }
            A::Respawn(n, on) => {
                let node = self.node(n);
                self.agents[node - 1].respawns = *on;
            }
            A::Probe(n, probe) => {
                let node = self.node(n);
                self.agents[node - 1].probe = *probe;
            }
            A::Device(n, works) => {
                let node = self.node(n);
                self.agents[node - 1].works = *works;
            }
            A::Stop(w) => self.each(w, |world, pid| world.procs[pid].stopped = true),
            A::Continue(w) => self.each(w, World::go_on),
            A::Hang(w) => self.each(w, |world, pid| world.hang(pid)),
            A::Stick(w) => self.each(w, |world, pid| world.procs[pid].step_loop.stuck = true),
            A::Unhang(w) => self.each(w, World::unhang),
            A::Slow(w, tenths) => {
                self.each(w, |world, pid| world.procs[pid].step_loop.slow = *tenths);
            }
            A::Corrupt(w) => self.each(w, World::corrupt),
            A::Rot(w) => self.each(w, |world, pid| {
                world.procs[pid].step_loop.rotten = true;
                world.tainted = true;
            }),
            A::Spoil => self.store.spoil_newest(),
            A::Unfit(w, on) => self.each(w, |world, pid| world.procs[pid].step_loop.unfit = *on),
            A::Notice(w) => self.each(w, |world, pid| {
                // The second one ends it at once.
                let again = std::mem::replace(&mut world.procs[pid].noticed, true);
                world.harmed |= again;
                // Without a stream it goes at once.
                world.rough |= again || world.procs[pid].conn.is_none();
                world.feed(pid, worker::Event::Drain { why: "SIGTERM".to_string() });
            }),
            A::Drain(w) => {
                let why = "operator".to_string();
                self.host_input(Event::Drain { worker: id(w), why });
            }
            A::Disk(w, disk) => self.set_disk(w, *disk),
            A::Cut(from, to) => {
                let (from, to) = (self.node(from), self.node(to));
                self.cut(from, to);
            }
            A::Uncut(from, to) => {
                let (from, to) = (self.node(from), self.node(to));
                self.uncut(from, to);
            }
            A::Break(w) => self.each(w, World::break_stream),
            A::Jump(w, ms) => self.jump(w, *ms),
            A::Crash { zombie } => {
                self.host.zombie = zombie.then_some(self.host.life);
                self.crash_host(None);
            }
            A::At(trap, back_after) => {
                self.host.trap = Some(*trap);
                self.host.back_after = back_after * MS;
            }
            A::Restart => self.start_host(),
            A::Stall(ms) => self.stall_host(*ms),
            A::Rest => self.host_input(Event::Stop { why: "asked to rest".to_string() }),
            A::Cancel => self.host_input(Event::Cancel { why: "not wanted any more".to_string() }),
            A::Resume => self.resume(),
            A::Checkpoint => self.host_input(Event::Checkpoint),
            A::Release(w) => self.host_input(Event::Release { worker: id(w) }),
            A::Force => self.host_input(Event::Force),
            A::Scale(min, max) => {
                (self.setup.min, self.setup.max) = (*min, *max);
                self.host_input(Event::Resize { min: *min, max: *max });
            }
            A::Repair => self.repair(),
        }
    }

    fn each(&mut self, worker: &str, mut act: impl FnMut(&mut World, Pid)) {
        for pid in self.lives(worker) {
            act(self, pid);
        }
    }

    fn go_on(&mut self, pid: Pid) {
        self.procs[pid].stopped = false;
        for ev in std::mem::take(&mut self.procs[pid].waiting) {
            self.happen(ev);
        }
    }

    fn corrupt(&mut self, pid: Pid) {
        if let Some(state) = &mut self.procs[pid].step_loop.state {
            state.digest ^= 0xBAD;
            state.tainted = true;
            self.tainted = true;
        }
    }

    fn set_disk(&mut self, whose: &str, disk: Disk) {
        match whose {
            "journal" => self.host.disk = disk,
            "manifests" => self.store.disk = disk,
            _ => self.each(whose, |world, pid| world.procs[pid].disk = disk),
        }
    }

    fn jump(&mut self, whose: &str, ms: u64) {
        if whose == "coordinator" {
            self.host.clock.jump(ms * MS);
            self.host_input(Event::Tick);
        }
        self.each(whose, |world, pid| world.procs[pid].clock.jump(ms * MS));
    }

    fn stall_host(&mut self, ms: u64) {
        if self.host.is_up() {
            self.host.stalled = true;
            let life = self.host.life;
            self.later(ms * MS, Ev::HostAwake { life });
        }
    }

    fn repair(&mut self) {
        self.uncut_all();
        self.setup.poison = 0;
        self.host.disk = Disk::Fine;
        self.host.trap = None;
        self.host.zombie = None;
        self.store.disk = Disk::Fine;
        self.host.excuses = EXCUSES;
        for pid in 0..self.procs.len() {
            self.procs[pid].disk = Disk::Fine;
            self.procs[pid].step_loop.slow = 0;
            self.procs[pid].step_loop.unfit = false;
            self.procs[pid].step_loop.rotten = false;
            if self.procs[pid].alive && self.procs[pid].unwatched {
                self.end_process(pid, None, false);
            }
            if self.procs[pid].alive {
                self.go_on(pid);
                self.unhang(pid);
            }
        }
        for agent in &mut self.agents {
            agent.respawns = true;
            agent.works = true;
        }
        self.later(10 * MS, Ev::HostStart);
        self.later(0, Ev::Tend);
    }

    /// An operator looks after the run: lets it go on, and adds workers where there are too few.
    pub(crate) fn tend(&mut self) {
        self.later(TEND, Ev::Tend);
        let probe = self.host.probe().unwrap_or(7);
        for agent in &mut self.agents {
            agent.probe = probe;
        }
        let resting = |e: &Ending| !matches!(e, Ending::Finished { .. });
        if self.host.ending().is_some_and(resting) {
            self.store.remove_damaged();
            self.resume();
        }
        self.release_all();
        self.restart_unfit();
        for device in 0..self.setup.min.max(1) {
            if self.living() < self.setup.min.max(1) {
                self.spawn(&id(&format!("repair:{device}")));
            }
        }
    }

    /// Lets everybody back in that is kept out.
    fn release_all(&mut self) {
        let Some(machine) = &self.host.machine else { return };
        let banned = machine.saved().banned.keys().cloned();
        let out = |w: &lacuna_control::coordinator::WorkerStatus| w.state == "quarantined";
        let waiting = machine.status().workers.into_iter().filter(out).map(|w| w.worker);
        let all: Vec<WorkerId> = banned.chain(waiting).collect();
        for worker in all {
            self.host_input(Event::Release { worker });
        }
    }

    /// Starts the processes anew that could not read data; those whose device was never ready are
    /// started by their agents.
    fn restart_unfit(&mut self) {
        let Some(machine) = &self.host.machine else { return };
        let unfit: Vec<WorkerId> = machine
            .status()
            .workers
            .into_iter()
            .filter(|w| w.state == "unfit")
            .map(|w| w.worker)
            .collect();
        for worker in unfit {
            self.each(worker.as_str(), |world, pid| {
                if world.procs[pid].warm {
                    world.end_process(pid, None, false);
                }
            });
        }
    }

    /// Workers that run or will be started again.
    pub(crate) fn living(&self) -> usize {
        let alive = |a: &&crate::agent::Agent| a.alive && a.respawns;
        self.agents.iter().filter(alive).map(|a| a.devices.len()).sum()
    }
}
