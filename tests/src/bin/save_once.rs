//! One process that saves, for tests that break its system calls one by one.
//!
//! `parts` writes all parts of a checkpoint. `commit` takes the run, says its generation, reads
//! receipts from stdin, commits, reads back and removes what no rule keeps; it says each when done.

use std::io::BufRead as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lacuna_tests::saves::{self, Coordinator};
use lacuna_types::exit;

#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// What the workers do.
    Parts { root: PathBuf, step: u64, generation: u64 },
    /// What a coordinator does.
    Commit { root: PathBuf, step: u64 },
}

fn run(role: Role) -> anyhow::Result<()> {
    match role {
        Role::Parts { root, step, generation } => {
            for receipt in saves::write_parts(&root, step, generation)? {
                print!("{receipt}");
            }
        }
        Role::Commit { root, step } => {
            let coordinator = Coordinator::open(&root)?;
            println!("generation {}", coordinator.generation);
            let mut receipts: Vec<String> = Vec::new();
            for line in std::io::stdin().lock().lines() {
                receipts.push(line? + "\n");
            }
            coordinator.commit(step, receipts)?;
            println!("committed");
            coordinator.verify(step)?;
            println!("verified");
            coordinator.retain()?;
            println!("retained");
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    lacuna_worker::entry::init_logs();
    match run(Args::parse().role) {
        Ok(()) => ExitCode::from(exit::OK),
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::from(exit::IO)
        }
    }
}
