//! A checkpoint that a worker cannot load.

use expect_test::expect;

use super::transcripts::Told;
use super::*;
use crate::coordinator::Examination;

fn checkpoint(step: u64) -> CheckpointRef {
    CheckpointRef { step: Step(step), manifest: format!("m{step}") }
}

/// One worker has nothing in memory and cannot load the newest checkpoint.
fn cannot_load() -> Told {
    let saved = Saved { checkpoint: Some(checkpoint(20)), ..Saved::default() };
    let mut told = Told::new(saved);
    told.hello("a", None, 0, false);
    told.say("a", ToCoordinator::Warm { probe: 7 });
    told.wait(500);
    let generation = Generation(1);
    let (state, trained) = (None, Generation(0));
    told.say("a", ToCoordinator::Prepared { generation, state, trained, kept: false });
    told.tell("the id is drawn", Event::CommId { generation, comm_id: vec![1; 32] });
    told.text.clear();
    let (kind, suspects) = (FaultKind::Checkpoint, vec![]);
    let detail = "part-0 is damaged".to_string();
    told.say("a", ToCoordinator::Fault { generation, kind, suspects, detail });
    told
}

fn examined(told: &mut Told, found: Examination) {
    let checkpoint = checkpoint(20);
    told.tell("the checkpoint was examined", Event::Examined { checkpoint, found });
}

#[test]
fn one_that_is_damaged_is_set_aside_for_the_one_before() {
    let mut told = cannot_load();
    // No group is formed before it is known.
    told.wait(1_000);
    let next = Some(checkpoint(10));
    examined(&mut told, Examination::Damaged { why: "other bytes".into(), next });
    told.form(2, &["a"], None, 10);
    told.check(expect![[r#"
        a: Fault { generation: Generation(1), kind: Checkpoint, suspects: [], detail: "part-0 is damaged" }
            note unreadable: a:0 cannot load the checkpoint of step 20, looking into it: part-0 is damaged
            examine the checkpoint of step 20
            to a:0: revoke 1
        after 1000 ms
        the checkpoint was examined
            persist: checkpoint of step 20 (m20) is set aside for that of step 10 (m10)
            note set-aside: the checkpoint of step 20 is damaged and set aside: other bytes; going back to that of step 10
            persist: generation 2: slots a:0 8 (new communicator; a:0 reports: part-0 is damaged)
            note forming: forming generation 2: 1 worker (a:0 reports: part-0 is damaged)
            to a:0: prepare 2
            draw an id for generation 2
        a: Prepared { generation: Generation(2), state: None, trained: Generation(1), kept: false }
        the id is drawn
            to a:0: connect, Checkpoint { manifest: "m10" }
        a: Synced { generation: Generation(2), step: Step(10), digest: 5 }
            persist: generation 2 trains from step 10
            to a:0: start 2 at step 10
            note formed: generation 2: 1 worker at step 10, from the newest checkpoint; slots: a:0 8
    "#]]);
}

#[test]
fn without_another_one_the_run_fails() {
    let mut told = cannot_load();
    examined(&mut told, Examination::Damaged { why: "other bytes".into(), next: None });
    told.check(expect![[r#"
        a: Fault { generation: Generation(1), kind: Checkpoint, suspects: [], detail: "part-0 is damaged" }
            note unreadable: a:0 cannot load the checkpoint of step 20, looking into it: part-0 is damaged
            examine the checkpoint of step 20
            to a:0: revoke 1
        the checkpoint was examined
            persist: failed (74): the checkpoint of step 20 is damaged and set aside: other bytes; there is no other to go back to: repair it, or remove its folder to begin again from the seed
            note failed: the checkpoint of step 20 is damaged and set aside: other bytes; there is no other to go back to: repair it, or remove its folder to begin again from the seed
            to a:0: Exit { code: 74, why: "the checkpoint of step 20 is damaged and set aside: other bytes; there is no other to go back to: repair it, or remove its folder to begin again from the seed" }
    "#]]);
}

#[test]
fn where_it_is_sound_the_worker_is_unfit() {
    let mut told = cannot_load();
    examined(&mut told, Examination::Sound);
    told.wait(500);
    told.check(expect![[r#"
        a: Fault { generation: Generation(1), kind: Checkpoint, suspects: [], detail: "part-0 is damaged" }
            note unreadable: a:0 cannot load the checkpoint of step 20, looking into it: part-0 is damaged
            examine the checkpoint of step 20
            to a:0: revoke 1
        the checkpoint was examined
            note unfit: worker a:0 is unfit: the checkpoint of step 20 is sound, but: part-0 is damaged
        after 500 ms
            persist: failed (74): no worker can go on (a:0: the checkpoint of step 20 is sound, but: part-0 is damaged)
            note failed: no worker can go on (a:0: the checkpoint of step 20 is sound, but: part-0 is damaged)
            to a:0: Exit { code: 74, why: "no worker can go on (a:0: the checkpoint of step 20 is sound, but: part-0 is damaged)" }
    "#]]);
}

#[test]
fn where_it_cannot_be_known_the_group_is_formed_again() {
    let mut told = cannot_load();
    examined(&mut told, Examination::Unknown { why: "the store is away".into() });
    told.wait(500);
    told.check(expect![[r#"
        a: Fault { generation: Generation(1), kind: Checkpoint, suspects: [], detail: "part-0 is damaged" }
            note unreadable: a:0 cannot load the checkpoint of step 20, looking into it: part-0 is damaged
            examine the checkpoint of step 20
            to a:0: revoke 1
        the checkpoint was examined
            note unexamined: the checkpoint of step 20 could not be examined: the store is away
        after 500 ms
            persist: generation 2: slots a:0 8 (new communicator; a:0 reports: part-0 is damaged)
            note forming: forming generation 2: 1 worker (a:0 reports: part-0 is damaged)
            to a:0: prepare 2
            draw an id for generation 2
    "#]]);
}

#[test]
fn nobody_waits_for_an_answer_for_ever() {
    let mut told = cannot_load();
    let deadline = told.ms + told.machine.timing.attempt.as_millis() as u64;
    while told.ms < deadline {
        let generation = Generation(1);
        told.beat("a", 0, 0, false, crate::message::Phase::Idle);
        assert_eq!(told.machine.saved().generation, generation);
        told.ms += 2_000;
    }
    told.text.clear();
    told.wait(0);
    // What comes too late changes nothing.
    examined(&mut told, Examination::Sound);
    told.check(expect![[r#"
        after 0 ms
            note unexamined: reading the checkpoint of step 20 took longer than 600s
            persist: generation 2: slots a:0 8 (new communicator; a:0 reports: part-0 is damaged)
            note forming: forming generation 2: 1 worker (a:0 reports: part-0 is damaged)
            to a:0: prepare 2
            draw an id for generation 2
        the checkpoint was examined
    "#]]);
}

#[test]
fn one_that_a_person_removed_is_gone_on_without() {
    let mut told = cannot_load();
    examined(&mut told, Examination::Gone { next: None });
    told.wait(500);
    told.check(expect![[r#"
        a: Fault { generation: Generation(1), kind: Checkpoint, suspects: [], detail: "part-0 is damaged" }
            note unreadable: a:0 cannot load the checkpoint of step 20, looking into it: part-0 is damaged
            examine the checkpoint of step 20
            to a:0: revoke 1
        the checkpoint was examined
            persist: no checkpoint is there any more
            note set-aside: the checkpoint of step 20 was removed; beginning again from the seed
        after 500 ms
            persist: generation 2: slots a:0 8 (new communicator; a:0 reports: part-0 is damaged)
            note forming: forming generation 2: 1 worker (a:0 reports: part-0 is damaged)
            to a:0: prepare 2
            draw an id for generation 2
    "#]]);
}

/// A newer one was committed while the answer was on its way.
#[test]
fn a_late_answer_sets_no_newer_one_aside() {
    let mut told = cannot_load();
    let done = Event::CheckpointDone {
        generation: Generation(1),
        attempt: AttemptSeq(1),
        checkpoint: checkpoint(30),
    };
    told.tell("a commit comes late", done);
    examined(&mut told, Examination::Damaged { why: "other bytes".into(), next: None });
    assert_eq!(told.machine.saved().checkpoint, Some(checkpoint(30)));
    assert_eq!(told.machine.ended(), None);
}
