//! What the machine does about short histories, as text: one event a line, behind it what it did.

use expect_test::{Expect, expect};

use super::*;
use crate::message::{Beat, Phase};
use crate::plan::CheckpointRef;

/// A coordinator that is told things in a few words and says what it does about them.
pub(super) struct Told {
    pub machine: Coordinator,
    pub ms: u64,
    pub text: String,
}

fn config() -> RunConfig {
    RunConfig { n_slots: 8, total_steps: 100, workers_max: 3, ..CONFIG }
}

fn member(name: &str) -> (WorkerId, Incarnation) {
    let id: WorkerId = format!("{name}:0").parse().unwrap();
    (id, Incarnation(u64::from(name.as_bytes()[0])))
}

impl Told {
    pub fn new(saved: Saved) -> Self {
        let machine = Coordinator::new(config(), Timing::one_machine(), saved, Timestamp(0));
        Told { machine, ms: 0, text: String::new() }
    }

    pub fn tell(&mut self, what: &str, event: Event) {
        let out = self.machine.handle(Timestamp::from_millis(self.ms), event);
        self.text += &format!("{what}\n");
        for command in out {
            if let Some(line) = describe(&command) {
                self.text += &format!("    {line}\n");
            }
        }
    }

    pub fn say(&mut self, name: &str, message: ToCoordinator) {
        let (worker, incarnation) = member(name);
        let what = format!("{name}: {message:?}");
        self.tell(&what, Event::Message { worker, incarnation, message });
    }

    pub fn hello(&mut self, name: &str, state: Option<u64>, generation: u64, up: bool) {
        let (worker, incarnation) = member(name);
        let (state, generation) = (state.map(Step), Generation(generation));
        let endpoint = "h:1".into();
        let what = format!("{name}: hello, in generation {generation}, up {up}");
        let hello = Hello { worker, incarnation, endpoint, state, generation, up };
        self.tell(&what, Event::Hello(hello));
    }

    pub fn wait(&mut self, ms: u64) {
        self.ms += ms;
        self.tell(&format!("after {ms} ms"), Event::Tick);
    }

    pub fn beat(&mut self, name: &str, step: u64, op_seq: u64, in_op: bool, phase: Phase) {
        self.beat_since(name, step, (op_seq, in_op), phase, 6000);
    }

    fn beat_since(
        &mut self,
        name: &str,
        step: u64,
        (op_seq, in_op): (u64, bool),
        phase: Phase,
        phase_ms: u64,
    ) {
        let (generation, step) = (self.machine.saved().generation, Step(step));
        let beat = Beat {
            generation,
            step,
            phase,
            phase_ms,
            op_seq,
            in_op,
            slot_us: 1000,
            data_us: 0,
            memory_bytes: 0,
        };
        self.say(name, ToCoordinator::Beat(beat));
    }

    /// Brings workers to training at step 0 in generation 1, and forgets what was said on the way.
    pub fn train(names: &[&str]) -> Told {
        let mut told = Told::new(Saved::default());
        for name in names {
            told.hello(name, None, 0, false);
            told.say(name, ToCoordinator::Warm { probe: 7 });
        }
        told.wait(500);
        told.form(1, names, None, 0);
        told.text.clear();
        told
    }

    /// Answers for all members until the generation starts.
    pub fn form(&mut self, generation: u64, names: &[&str], state: Option<u64>, resume: u64) {
        let generation = Generation(generation);
        let state = state.map(Step);
        for name in names {
            self.say(
                name,
                ToCoordinator::Prepared { generation, state, trained: Generation(1), kept: false },
            );
        }
        let comm_id = vec![1; 32];
        self.tell("the id is drawn", Event::CommId { generation, comm_id });
        let step = Step(resume);
        for name in names {
            self.say(name, ToCoordinator::Synced { generation, step, digest: 5 });
        }
    }

    pub fn check(self, expect: Expect) {
        expect.assert_eq(&self.text);
    }
}

/// One line for what people would want to see of a command.
fn describe(command: &Command) -> Option<String> {
    Some(match command {
        Command::Persist(record) => format!("persist: {record}"),
        Command::Send { to, message, .. } => format!("to {to}: {}", shortly(message)),
        Command::Disconnect { worker, .. } => format!("disconnect {worker}"),
        Command::Kill { worker, why, .. } => format!("kill {worker}: {why}"),
        Command::DrawCommId(generation) => format!("draw an id for generation {generation}"),
        Command::Commit(order) => format!("commit step {}", order.step),
        Command::Examine(c) => format!("examine the checkpoint of step {}", c.step),
        Command::Note(note) => format!("note {}: {}", note.kind, note.text),
        Command::NameSamples(step) => format!("name the samples of step {step}"),
        Command::Mark(_) => return None,
    })
}

fn shortly(message: &ToWorker) -> String {
    match message {
        ToWorker::Prepare(plan) => format!("prepare {}", plan.generation),
        ToWorker::Connect { sync, .. } => format!("connect, {:?}", sync.origin),
        ToWorker::Start { generation, resume_step } => {
            format!("start {generation} at step {resume_step}")
        }
        ToWorker::Revoke { generation, .. } => format!("revoke {generation}"),
        other => format!("{other:?}"),
    }
}

#[test]
fn a_restarted_coordinator_finds_its_group_where_it_is() {
    let saved = Told::train(&["a", "b"]).machine.saved().clone();
    let mut told = Told::new(saved);
    told.hello("a", Some(30), 1, true);
    told.say("a", ToCoordinator::Warm { probe: 7 });
    told.hello("b", Some(31), 1, true);
    told.check(expect![[r#"
        a: hello, in generation 1, up true
        a: Warm { probe: 7 }
        b: hello, in generation 1, up true
            to a:0: start 1 at step 0
            to b:0: start 1 at step 0
            note recovered: generation 1 goes on as it was: all 2 workers are back
    "#]]);
}

#[test]
fn a_member_that_does_not_come_back_to_a_restarted_coordinator_is_left_out() {
    let saved = Told::train(&["a", "b"]).machine.saved().clone();
    let mut told = Told::new(saved);
    told.hello("a", Some(30), 1, true);
    told.say("a", ToCoordinator::Warm { probe: 7 });
    for _ in 0..5 {
        told.ms += 1150;
        told.beat("a", 31, 1, true, Phase::Reduce);
    }
    told.text.clear();
    told.wait(250);
    told.wait(200);
    told.check(expect![[r#"
        after 250 ms
            note lost: worker b:0 lost at step 31 (it did not come back to the restarted coordinator; last phase idle)
            to a:0: revoke 1
            to b:0: revoke 1
        after 200 ms
            persist: generation 2: slots a:0 8 (new communicator; worker b:0 lost at step 31 (it did not come back to the restarted coordinator; last phase idle))
            note forming: forming generation 2: 1 worker (worker b:0 lost at step 31 (it did not come back to the restarted coordinator; last phase idle))
            to a:0: prepare 2
            draw an id for generation 2
    "#]]);
}

#[test]
fn a_plan_that_was_not_started_is_said_again_after_a_restart() {
    let mut told = Told::new(Saved::default());
    told.hello("a", None, 0, false);
    told.say("a", ToCoordinator::Warm { probe: 7 });
    told.wait(500);
    let mut told = Told::new(told.machine.saved().clone());
    told.hello("a", None, 1, false);
    told.form(1, &["a"], None, 0);
    told.check(expect![[r#"
        a: hello, in generation 1, up false
            to a:0: prepare 1
            draw an id for generation 1
        a: Prepared { generation: Generation(1), state: None, trained: Generation(1), kept: false }
        the id is drawn
            to a:0: connect, Seed
        a: Synced { generation: Generation(1), step: Step(0), digest: 5 }
            persist: generation 1 trains from step 0
            to a:0: start 1 at step 0
            note formed: generation 1: 1 worker at step 0, from the seed; slots: a:0 8
    "#]]);
}

#[test]
fn a_stream_that_breaks_and_returns_costs_no_generation() {
    let mut told = Told::train(&["a", "b"]);
    let (worker, incarnation) = member("b");
    told.tell("b's stream breaks", Event::StreamLost { worker, incarnation });
    told.ms += 400;
    told.hello("b", Some(3), 1, true);
    told.wait(700);
    told.check(expect![[r#"
        b's stream breaks
        b: hello, in generation 1, up true
            to b:0: start 1 at step 0
        after 700 ms
    "#]]);
}

#[test]
fn whoever_has_not_entered_an_operation_in_which_others_wait_is_to_blame() {
    let mut told = Told::train(&["a", "b", "c"]);
    for ms in (0..40).map(|n| 500 + n * 900) {
        told.ms = ms;
        let op = 20 + u64::from(ms > 900);
        told.beat("a", 6, op, true, Phase::Reduce);
        told.beat("b", 6, 20, false, Phase::Compute);
        told.beat("c", 6, op, true, Phase::Reduce);
    }
    let at = told.text.find("    note stuck").expect("it is noticed");
    let told = Told {
        text: "many beats\n"
            .chars()
            .chain(told.text[at..].chars())
            .collect::<String>()
            .split_inclusive('\n')
            .take(8)
            .collect(),
        ..told
    };
    told.check(expect![[r#"
        many beats
            note stuck: b:0 holds step 6 up: in compute since 6.9 s, while a:0, c:0 wait in operation 21
            to b:0: Exit { code: 1, why: "b:0 holds step 6 up: in compute since 6.9 s, while a:0, c:0 wait in operation 21" }
            kill b:0: b:0 holds step 6 up: in compute since 6.9 s, while a:0, c:0 wait in operation 21
            disconnect b:0
            note lost: worker b:0 lost at step 6 (it holds the group up; last phase compute)
            to a:0: revoke 1
            to b:0: revoke 1
    "#]]);
}

#[test]
fn who_waits_for_data_holds_nobody_up_until_it_should_have_given_up_itself() {
    let mut told = Told::train(&["a", "b", "c"]);
    let stuck = |told: &Told| told.text.contains("note stuck");
    for ms in (0..400).map(|n| 500 + n * 900) {
        told.ms = ms;
        let op = 20 + u64::from(ms > 900);
        told.beat("a", 6, op, true, Phase::Reduce);
        told.beat_since("b", 6, (20, false), Phase::Data, ms);
        told.beat("c", 6, op, true, Phase::Reduce);
        assert!(ms > 240_000 || !stuck(&told), "{}", told.text);
    }
    assert!(stuck(&told), "nobody is waited for for ever");
}

#[test]
fn most_members_outvote_one_and_the_run_goes_back_to_its_checkpoint() {
    let mut told = Told::train(&["a", "b", "c"]);
    let checkpoint = CheckpointRef { step: Step(8), manifest: "m".into() };
    let (generation, attempt) = (Generation(0), AttemptSeq(1));
    let done = Event::CheckpointDone { generation, attempt, checkpoint };
    told.tell("a checkpoint is committed", done);
    told.text.clear();
    for (name, digest) in [("a", 1), ("b", 9), ("c", 1)] {
        let (generation, step) = (Generation(1), Step(10));
        told.say(name, ToCoordinator::Held { generation, step, digest });
    }
    told.wait(200);
    told.form(2, &["a", "b", "c"], Some(10), 8);
    told.check(expect![[r#"
        a: Held { generation: Generation(1), step: Step(10), digest: 1 }
        b: Held { generation: Generation(1), step: Step(10), digest: 9 }
        c: Held { generation: Generation(1), step: Step(10), digest: 1 }
            note differs: states differ: a:0 has 0000000000000001 at step 10, b:0 has 0000000000000009 at step 10, c:0 has 0000000000000001 at step 10
            persist: states in memory are not trusted
            note distrusted: going back to the checkpoint of step 8: states differ: a:0 has 0000000000000001 at step 10, b:0 has 0000000000000009 at step 10, c:0 has 0000000000000001 at step 10
            to a:0: revoke 1
            to b:0: revoke 1
            to c:0: revoke 1
            note doubted: b:0: its state differed from most others'
        after 200 ms
            persist: generation 2: slots a:0 2, b:0 3, c:0 3 (new communicator; states differ: a:0 has 0000000000000001 at step 10, b:0 has 0000000000000009 at step 10, c:0 has 0000000000000001 at step 10)
            note forming: forming generation 2: 3 workers (states differ: a:0 has 0000000000000001 at step 10, b:0 has 0000000000000009 at step 10, c:0 has 0000000000000001 at step 10)
            to a:0: prepare 2
            to b:0: prepare 2
            to c:0: prepare 2
            draw an id for generation 2
        a: Prepared { generation: Generation(2), state: Some(Step(10)), trained: Generation(1), kept: false }
        b: Prepared { generation: Generation(2), state: Some(Step(10)), trained: Generation(1), kept: false }
        c: Prepared { generation: Generation(2), state: Some(Step(10)), trained: Generation(1), kept: false }
        the id is drawn
            to a:0: connect, Checkpoint { manifest: "m" }
            to b:0: connect, Checkpoint { manifest: "m" }
            to c:0: connect, Checkpoint { manifest: "m" }
        a: Synced { generation: Generation(2), step: Step(8), digest: 5 }
        b: Synced { generation: Generation(2), step: Step(8), digest: 5 }
        c: Synced { generation: Generation(2), step: Step(8), digest: 5 }
            persist: generation 2 trains from step 8
            to a:0: start 2 at step 8
            to b:0: start 2 at step 8
            to c:0: start 2 at step 8
            note formed: generation 2: 3 workers at step 8, from the newest checkpoint; slots: a:0 2, b:0 3, c:0 3; steps 9 to 11 computed anew, 0 samples skipped, 0.2 s
    "#]]);
}

#[test]
fn of_two_that_differ_the_probe_tells_who_is_right() {
    let mut told = Told::train(&["a", "b"]);
    let generation = Generation(1);
    for (name, digest) in [("a", 1), ("b", 9)] {
        told.say(name, ToCoordinator::Held { generation, step: Step(10), digest });
    }
    told.say("a", ToCoordinator::Audited { generation, probe: 7 });
    told.say("b", ToCoordinator::Audited { generation, probe: 8 });
    told.check(expect![[r#"
        a: Held { generation: Generation(1), step: Step(10), digest: 1 }
        b: Held { generation: Generation(1), step: Step(10), digest: 9 }
            note differs: states differ: a:0 has 0000000000000001 at step 10, b:0 has 0000000000000009 at step 10
            persist: states in memory are not trusted
            note distrusted: going back to the seed: states differ: a:0 has 0000000000000001 at step 10, b:0 has 0000000000000009 at step 10
            to a:0: revoke 1
            to b:0: revoke 1
            to a:0: Audit { generation: Generation(1) }
            to b:0: Audit { generation: Generation(1) }
        a: Audited { generation: Generation(1), probe: 7 }
        b: Audited { generation: Generation(1), probe: 8 }
            note refused: b:0 computes other bits than when it began (its probe is not the run's): its memory or device is broken
            to b:0: Exit { code: 78, why: "b:0 computes other bits than when it began (its probe is not the run's): its memory or device is broken" }
            note lost: worker b:0 lost at step 10 (refused; last phase idle)
            note quarantined: b:0 is kept out for 10s: b:0 computes other bits than when it began (its probe is not the run's): its memory or device is broken
    "#]]);
}

/// Two members of a group differ, and compute the probe again.
fn two_that_differ() -> Told {
    let mut told = Told::train(&["a", "b"]);
    let generation = Generation(1);
    for (name, digest) in [("a", 1), ("b", 9)] {
        told.say(name, ToCoordinator::Held { generation, step: Step(10), digest });
    }
    told
}

#[test]
fn where_the_probe_tells_nothing_the_run_pauses_and_says_why() {
    let generation = Generation(1);
    let audited = |probe| ToCoordinator::Audited { generation, probe };
    let why = |told: &Told| match told.machine.ended() {
        Some(Ending::Paused { why }) => why.clone(),
        _ => panic!("{}", told.text),
    };
    let mut told = two_that_differ();
    told.say("a", audited(7));
    told.say("b", audited(7));
    let text = why(&told);
    assert!(text.ends_with("a slot computed again tells a:0 and b:0 not apart, so a person must"));

    // The one that answers is wrong, and the other one is there and says nothing.
    let mut told = two_that_differ();
    told.say("a", audited(8));
    while told.machine.ended().is_none() {
        for name in ["a", "b"] {
            told.beat(name, 10, 0, false, Phase::Idle);
        }
        told.wait(1000);
        assert!(told.ms < 700_000, "it waits for ever: {}", told.text);
    }
    assert!(told.ms > 600_000, "it has the time of an audit: {}", told.ms);
    let text = why(&told);
    assert!(text.ends_with("b:0 computed no slot again in time, and wrong was a:0"), "{text}");
}

/// A whole group's machines start again: each new process under a name is proof that the old one is
/// gone, although nothing else said so.
#[test]
fn members_that_are_back_as_new_processes_wait_for_nobody() {
    let mut told = Told::train(&["a", "b"]);
    told.wait(3100);
    assert_eq!(told.machine.status().workers.len(), 0, "{}", told.text);
    told.text.clear();
    for name in ["a", "b"] {
        let worker = member(name).0;
        let incarnation = Incarnation(900);
        let (endpoint, generation) = ("h:1".into(), Generation(0));
        let hello = Hello { worker, incarnation, endpoint, state: None, generation, up: false };
        told.tell(&format!("{name}: hello from a new process"), Event::Hello(hello));
        let (worker, message) = (member(name).0, ToCoordinator::Warm { probe: 7 });
        told.tell("it is ready", Event::Message { worker, incarnation, message });
    }
    told.wait(500);
    assert!(told.text.contains("forming generation 2: 2 workers"), "{}", told.text);
    assert!(!told.text.contains("may be training on"), "{}", told.text);
}

#[test]
fn members_that_fell_silent_together_may_be_training_on() {
    let mut told = Told::train(&["a", "b"]);
    told.wait(3100);
    told.hello("z", None, 0, false);
    told.say("z", ToCoordinator::Warm { probe: 7 });
    told.wait(300);
    told.tell("an operator forces it", Event::Force);
    told.wait(500);
    told.check(expect![[r#"
        after 3100 ms
            disconnect a:0
            note lost: worker a:0 lost at step 0 (no beat for 3.1 s; last phase idle)
            to a:0: revoke 1
            to b:0: revoke 1
            disconnect b:0
            note lost: worker b:0 lost at step 0 (no beat for 3.1 s; last phase idle)
        z: hello, in generation 0, up false
        z: Warm { probe: 7 }
        after 300 ms
            note waiting: waiting for the members of generation 1 (a:0, b:0), which fell silent and may be training on: others begin 10s after that, or when an operator forces it
        an operator forces it
            note forced: an operator gave silent members up
            persist: a member is gone for certain: the group is over
        after 500 ms
            persist: generation 2: slots z:0 8 (new communicator; workers are ready)
            note forming: forming generation 2: 1 worker (workers are ready)
            to z:0: prepare 2
            draw an id for generation 2
    "#]]);
}
