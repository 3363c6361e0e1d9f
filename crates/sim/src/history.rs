//! Histories by number: a seed is a topology, a run, and a schedule of faults.

use std::panic::{AssertUnwindSafe, catch_unwind};

use lacuna_control::coordinator::WhenBusy;
use lacuna_control::invariants::{Invariant, Violation};

use crate::action::Action;
use crate::bugs::Bug;
use crate::catalogue::Disk;
use crate::coverage::Coverage;
use crate::host::{Trap, Write};
use crate::rng::Rng;
use crate::script::{Condition, Line, Script};
use crate::setup::Setup;
use crate::world::{Counts, Detail, World};

/// What became of a history.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What went wrong, if anything did.
    pub violation: Option<Violation>,
    /// Where the machines were.
    pub coverage: Coverage,
    /// Figures.
    pub counts: Counts,
    /// What happened, if it was asked for.
    pub transcript: Vec<String>,
}

/// Plays a script to its end.
pub fn play(script: &Script, detail: Detail) -> Outcome {
    let mut world = World::new(&script.setup, detail);
    // A machine must not panic whatever happens to it: if it does, that is what went wrong.
    let played = catch_unwind(AssertUnwindSafe(|| world.play(script)));
    if played.is_err() {
        world.breach(Invariant::Liveness, "a panic");
    }
    Outcome {
        violation: world.violation.clone(),
        coverage: world.coverage.clone(),
        counts: world.counts().clone(),
        transcript: world.lines().to_vec(),
    }
}

const NODES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// Draws the history of a seed, with a planted bug or without.
pub fn draw(seed: u64, plant: Bug) -> Script {
    let mut rng = Rng::new(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let setup = draw_setup(&mut rng, seed, plant);
    let n_nodes = rng.range(1, 5) as usize;
    let mut lines: Vec<Line> = Vec::new();
    for node in &NODES[..n_nodes] {
        lines.push(Line::At(rng.below(400), Action::Spawn(format!("{node}:0"))));
    }
    // Now and then a second device on the first node.
    if rng.one_in(6) {
        lines.push(Line::At(rng.below(400), Action::Spawn("a:1".to_string())));
    }
    let n_faults = *pick(&mut rng, &[0, 2, 4, 8, 14]) + rng.below(4);
    let span = setup.steps * setup.step_ms + 3_000;
    let mut faults: Vec<(u64, Action)> = Vec::new();
    // Some histories hold nothing that anybody may fail of.
    let peaceful = rng.one_in(6);
    let gentle = rng.one_in(6);
    for _ in 0..n_faults {
        let at = 700 + rng.below(span);
        draw_fault(&mut rng, n_nodes, at, &mut faults);
    }
    faults.retain(|(_, action)| {
        (!peaceful || action.is_harmless()) && (!gentle || action.is_gentle())
    });
    if rng.one_in(3) {
        gather(&mut rng, &mut faults);
    }
    lines.extend(faults.into_iter().map(|(at, action)| Line::At(at, action)));
    lines.sort_by_key(|line| match line {
        Line::At(ms, _) => *ms,
        _ => 0,
    });
    let last = lines.iter().map(|line| if let Line::At(ms, _) = line { *ms } else { 0 }).max();
    let rest = last.unwrap_or(0) + rng.below(4_000);
    if !peaceful && !gentle && rng.one_in(3) {
        draw_reactions(&mut rng, n_nodes, &mut lines);
    }
    lines.push(Line::At(rest, Action::Repair));
    lines.push(Line::Until(Condition::Ended("finished".to_string()), None));
    Script { setup, lines }
}

/// Moves faults close together, where they meet each other's consequences.
fn gather(rng: &mut Rng, faults: &mut [(u64, Action)]) {
    let Some((centre, _)) = faults.first() else { return };
    let centre = *centre;
    for (at, _) in faults.iter_mut() {
        if rng.one_in(2) {
            *at = centre + rng.below(900);
        }
    }
    // What ends a fault still comes after it.
    faults.sort_by_key(|(at, _)| *at);
}

/// Draws faults that come at a moment of the protocol, wherever that is.
fn draw_reactions(rng: &mut Rng, n_nodes: usize, lines: &mut Vec<Line>) {
    const STAGES: [&str; 6] = ["forming", "syncing", "running", "held", "recovering", "disputed"];
    const PHASES: [&str; 4] = ["compute", "reduce", "optimizer", "sync"];
    for _ in 0..rng.range(1, 5) {
        let worker = format!("{}:0", pick(rng, &NODES[..n_nodes]));
        let condition = match rng.below(4) {
            0 | 1 => Condition::Stage(pick(rng, &STAGES).to_string()),
            2 => Condition::Phase(worker, pick(rng, &PHASES).to_string()),
            _ => Condition::Parts(rng.range(1, 8)),
        };
        let mut faults: Vec<(u64, Action)> = Vec::new();
        draw_fault(rng, n_nodes, 0, &mut faults);
        let mut first = true;
        for (after, action) in faults {
            if std::mem::take(&mut first) {
                lines.push(Line::When(condition.clone(), 4_000, action));
            } else {
                lines.push(Line::Wait(after.min(5_000)));
                lines.push(Line::Now(action));
            }
        }
        if rng.one_in(2) {
            lines.push(Line::Wait(rng.below(300)));
        }
    }
}

fn draw_setup(rng: &mut Rng, seed: u64, plant: Bug) -> Setup {
    let slots = rng.range(2, 10) as u32;
    let max = rng.range(1, 5) as usize;
    Setup {
        seed,
        slots,
        steps: rng.range(10, 60),
        min: rng.range(1, max.min(3) as u64) as usize,
        max,
        checkpoint: *pick(rng, &[0, 5, 10, 20]),
        when_busy: *pick(rng, &[WhenBusy::Skip, WhenBusy::Wait, WhenBusy::Cancel]),
        step_ms: rng.range(80, 400),
        mark_every: rng.range(1, 8),
        digest_every: rng.range(2, 12),
        latency_ms: *pick(rng, &[2, 4, 20, 60]),
        duplicate_in: *pick(rng, &[0, 0, 0, 20]),
        sync_ms: *pick(rng, &[1, 1, 10]),
        commit_ms: *pick(rng, &[20, 20, 20, 1_500]),
        heal_ms: *pick(rng, &[60, 60, 60, 1_500]),
        poison: if rng.one_in(60) { rng.range(1, 20) } else { 0 },
        skew_ppm: *pick(rng, &[0, 200, 20_000]),
        give_up_ms: *pick(rng, &[600_000, 600_000, 15_000]),
        plant,
        ..Setup::default()
    }
}

fn pick<'a, T>(rng: &mut Rng, from: &'a [T]) -> &'a T {
    &from[rng.below(from.len() as u64) as usize]
}

/// Draws one fault, and where it does not pass by itself, its end.
fn draw_fault(rng: &mut Rng, n_nodes: usize, at: u64, out: &mut Vec<(u64, Action)>) {
    use Action as A;
    let node = pick(rng, &NODES[..n_nodes]).to_string();
    let worker = format!("{node}:0");
    let until =
        at + *pick(rng, &[300, 1_500, 4_000, 10_000, 16_000, 32_000]) * rng.range(80, 120) / 100;
    match rng.below(39) {
        0..=4 => out.push((at, A::Kill(worker))),
        5 => out.push((at, A::Fail(worker))),
        6 => {
            out.push((at, A::KillAgent(node)));
            out.push((until, A::Spawn(worker)));
        }
        7 => {
            out.push((at, A::Lose(node)));
            out.push((until, A::Spawn(worker)));
        }
        8 | 9 => {
            out.push((at, A::Stop(worker.clone())));
            out.push((until, A::Continue(worker)));
        }
        10 => {
            out.push((at, A::Hang(worker.clone())));
            out.push((until, A::Unhang(worker)));
        }
        11 => {
            out.push((at, A::Stick(worker.clone())));
            out.push((until, A::Unhang(worker)));
        }
        12 => out.push((at, A::Slow(worker, rng.below(60)))),
        13 => {
            out.push((at, A::Notice(worker.clone())));
            out.push((until, A::Spawn(worker)));
        }
        14 => {
            out.push((at, A::Drain(worker.clone())));
            out.push((until, A::Spawn(worker)));
        }
        15..=17 => draw_cut(rng, n_nodes, (at, until), &node, out),
        18 | 19 => out.push((at, A::Break(worker))),
        20 => {
            let whose = if rng.one_in(2) { "coordinator".to_string() } else { worker };
            out.push((at, A::Jump(whose, rng.range(100, 5_000))));
        }
        21..=23 => {
            let zombie = rng.one_in(2);
            let back = if zombie { at + rng.below(1_500) } else { until };
            out.push((at, A::Crash { zombie }));
            out.push((back, A::Restart));
        }
        24 | 25 => out.push((at, A::At(draw_trap(rng), rng.range(100, 5_000)))),
        26 => out.push((at, A::Stall(rng.range(200, 6_000)))),
        27 => draw_disk(rng, (at, until), worker, out),
        28 => {
            out.push((at, if rng.one_in(3) { A::Cancel } else { A::Rest }));
            out.push((until, A::Resume));
        }
        29 => out.push((at, A::Checkpoint)),
        30 => out.push((at, A::Twin(worker))),
        36 | 37 => {
            out.push((at, A::Spoil));
            // It matters to those alone that have nothing in memory.
            for node in &NODES[..n_nodes] {
                out.push((at + rng.below(2_000), A::Kill(format!("{node}:0"))));
            }
        }
        38 => {
            out.push((at, A::Device(node.clone(), false)));
            out.push((until, A::Device(node, true)));
        }
        33 => out.push((at, A::Force)),
        34 => out.push((at, A::Release(worker))),
        31 => {
            out.push((at, A::Unfit(worker.clone(), true)));
            out.push((until, A::Kill(worker)));
        }
        _ => {
            if rng.one_in(2) {
                out.push((at, if rng.one_in(2) { A::Corrupt(worker) } else { A::Rot(worker) }));
            } else {
                out.push((at, A::Probe(node, rng.range(7, 9))));
                out.push((at + 1, A::Kill(worker)));
            }
        }
    }
}

fn draw_trap(rng: &mut Rng) -> Trap {
    if rng.one_in(2) {
        Trap::Command(rng.below(30))
    } else {
        let write = if rng.one_in(2) { Write::Lost } else { Write::Kept };
        Trap::Persist(rng.below(3), write)
    }
}

fn draw_cut(
    rng: &mut Rng,
    n_nodes: usize,
    (at, until): (u64, u64),
    node: &str,
    out: &mut Vec<(u64, Action)>,
) {
    if rng.one_in(5) {
        for node in &NODES[..n_nodes] {
            let (node, coordinator) = (node.to_string(), "coordinator".to_string());
            for (from, to) in [(node.clone(), coordinator.clone()), (coordinator, node)] {
                out.push((at, Action::Cut(from.clone(), to.clone())));
                out.push((until, Action::Uncut(from, to)));
            }
        }
        return;
    }
    let other = match rng.below(2) {
        0 => "coordinator".to_string(),
        _ => pick(rng, &NODES[..n_nodes]).to_string(),
    };
    if other == node {
        return;
    }
    let both = rng.one_in(2);
    let mut pairs = vec![(node.to_string(), other.clone())];
    if both || rng.one_in(2) {
        pairs.push((other, node.to_string()));
    }
    if !both {
        pairs.swap_remove(0);
    }
    for (from, to) in pairs {
        out.push((at, Action::Cut(from.clone(), to.clone())));
        out.push((until, Action::Uncut(from, to)));
    }
}

fn draw_disk(rng: &mut Rng, (at, until): (u64, u64), worker: String, out: &mut Vec<(u64, Action)>) {
    let whose = match rng.below(4) {
        0 => "manifests".to_string(),
        1 => "journal".to_string(),
        _ => worker,
    };
    let slow = Disk::Slow(rng.range(100, 12_000));
    let disk = if whose != "journal" && rng.one_in(2) { Disk::Full } else { slow };
    out.push((at, Action::Disk(whose.clone(), disk)));
    out.push((until, Action::Disk(whose, Disk::Fine)));
}
