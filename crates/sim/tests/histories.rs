//! Histories by seed: they violate nothing, unless a bug is planted.

use lacuna_control::invariants::Invariant;
use lacuna_sim::bugs::Bug;
use lacuna_sim::history::{draw, play};
use lacuna_sim::script::Script;
use lacuna_sim::shrink::shrink;
use lacuna_sim::world::Detail;

/// Seeds of every run of the tests; `make sim` plays many more.
const SEEDS: u64 = 200;

#[test]
fn histories_violate_nothing() {
    for seed in 0..SEEDS {
        let outcome = play(&draw(seed, Bug::None), Detail::None);
        assert!(
            outcome.violation.is_none(),
            "seed {seed}: {} (lacuna-sim replay {seed} --shrink)",
            outcome.violation.unwrap()
        );
    }
}

#[test]
fn a_seed_is_one_history() {
    for seed in [3, 77] {
        let script = draw(seed, Bug::None);
        let again: Script = script.to_string().parse().expect("a script reads what it writes");
        assert_eq!(script.to_string(), again.to_string());
        let (one, other) = (play(&script, Detail::Notes), play(&again, Detail::Notes));
        assert_eq!(one.transcript, other.transcript, "seed {seed}");
    }
}

/// Returns the first seed below `limit` whose history violates something.
fn found_by(plant: Bug, limit: u64) -> Option<(u64, Invariant)> {
    (0..limit)
        .find_map(|seed| Some((seed, play(&draw(seed, plant), Detail::None).violation?.invariant)))
}

/// Checks that a planted bug is found within `limit` seeds, as a violation of one of `as_one_of`.
fn check(plant: Bug, limit: u64, as_one_of: &[Invariant]) {
    match found_by(plant, limit) {
        Some((_, invariant)) if as_one_of.contains(&invariant) => {}
        other => panic!("{plant}: {other:?}"),
    }
}

use Invariant as I;

#[test]
fn a_skipped_write_is_found() {
    check(Bug::SkipPersist, 10, &[I::OnePlan]);
    check(Bug::SayBeforeDurable, 10, &[I::OnePlan]);
    check(Bug::SkipEnding, 10, &[I::Liveness, I::Replay]);
    check(Bug::SkipStarted, 200, &[I::Liveness, I::Replay]);
}

#[test]
fn a_generation_that_is_used_twice_is_found() {
    check(Bug::ReuseGeneration, 200, &[I::OnePlan, I::Replay]);
}

#[test]
fn a_dropped_fence_is_found() {
    check(Bug::DropFence, 1_000, &[I::OneDigest, I::NothingStale]);
    check(Bug::StaleGift, 1_000, &[I::EachSlotOnce, I::OneDigest]);
}

#[test]
fn a_wrong_sum_is_found() {
    check(Bug::CountSlotTwice, 20, &[I::EachSlotOnce]);
    check(Bug::LoseSlot, 20, &[I::EachSlotOnce]);
    check(Bug::RankMixup, 100, &[I::EachSlotOnce]);
}

#[test]
fn half_a_control_word_is_found() {
    check(Bug::HalfControlWord, 2_000, &[I::Liveness, I::OneDigest]);
    check(Bug::SaveAlone, 200, &[I::OneDigest]);
}

#[test]
fn a_torn_update_is_found() {
    check(Bug::ApplyTorn, 200, &[I::EachSlotOnce]);
    check(Bug::ApplyTwice, 50, &[I::OneDigest]);
}

/// A worker that claims a state which it has received by half harms nobody: only a state that was
/// trained is gone on from.
#[test]
fn half_a_transfer_does_no_harm() {
    assert_eq!(found_by(Bug::HalfHeal, 1_000), None);
}

#[test]
fn a_wrong_commit_is_found() {
    check(Bug::CommitFromOld, 500, &[I::MembersCommit]);
    check(Bug::CommitWithoutPart, 20, &[I::NewestNeverBack]);
    check(Bug::CheckpointGoesBack, 200, &[I::NewestNeverBack]);
}

#[test]
fn a_damaged_checkpoint_that_is_used_is_found() {
    check(Bug::LoadUnverified, 500, &[I::OneDigest]);
    check(Bug::ExamineNothing, 500, &[I::Liveness]);
}

#[test]
fn a_failing_history_shrinks_to_a_few_lines() {
    let (seed, invariant) = found_by(Bug::CheckpointGoesBack, 200).expect("it is found");
    let script = draw(seed, Bug::CheckpointGoesBack);
    let short = shrink(&script, invariant);
    assert!(short.lines.len() <= 8, "{short}");
    let found = play(&short, Detail::None).violation.expect("it fails like the long one");
    assert_eq!(found.invariant, invariant);
}
