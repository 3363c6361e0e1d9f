//! The claim under drawn faults: a few cells of the matrix of `make chaos`, each in seconds.

use lacuna_tests::chaos::Row;
use lacuna_tests::chaos::cell::{self, Cell};
use lacuna_tests::rig::Bench;

use crate::binaries;

/// Long enough for a step to be applied between the faults of every cell.
const STEPS: u64 = 150;

/// Kinds of faults and numbers of workers: each kind and each number of the matrix.
const CELLS: [(Row, usize); 5] = [
    (Row::Kills, 3),
    (Row::Coordinator, 2),
    (Row::JoinDrain, 1),
    (Row::Stops, 5),
    (Row::Partitions, 3),
];

#[test]
fn drawn_faults_change_no_bit() {
    let bench = Bench::new(binaries());
    let want = cell::reference(&bench, STEPS).unwrap();
    for (row, world) in CELLS {
        let cell = Cell { row, world, seed: 1, steps: STEPS, faults: 2 };
        let outcome = cell::run(&bench, &cell, want);
        let faults = outcome.faults.join("\n  ");
        let problems = outcome.problems.join("\n  ");
        assert!(
            outcome.problems.is_empty(),
            "{row} with {world} workers:\n  {problems}\nfaults:\n  {faults}\n{}\n{}",
            outcome.events,
            outcome.tail
        );
        println!("{row} with {world} workers: {:?}", outcome.took);
    }
}
