//! A folder to work in, and checkpoints as training commits them.
#![allow(dead_code, reason = "each test program uses its part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lacuna_checkpoint::commit::{Context, claim, commit};
use lacuna_checkpoint::layout::{Attempt, PartId, RunDir};
use lacuna_checkpoint::manifest::{Loss, RunFacts};
use lacuna_checkpoint::partition::Partition;
use lacuna_checkpoint::state::{StateView, digest_state};
use lacuna_checkpoint::write::{PartInfo, write_part};
use lacuna_recipe::state::{Counters, Layout};
use lacuna_types::{AttemptSeq, CoordEpoch, Generation, Step};
use serde_json::Value;

/// A folder to work in, and the command with its output.
pub struct Desk(tempfile::TempDir);

impl Desk {
    /// Makes the folder.
    pub fn new() -> Self {
        Desk(tempfile::tempdir().unwrap())
    }

    /// Returns a path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a command in the folder.
    pub fn output(&self, args: &[&str]) -> Output {
        let lacuna = env!("CARGO_BIN_EXE_lacuna");
        Command::new(lacuna)
            .args(args)
            .current_dir(self.0.path())
            .env("COLUMNS", "100")
            .env("NO_COLOR", "1")
            .output()
            .unwrap()
    }

    /// Runs a command that must end with `code`; returns stdout, and stderr after it.
    pub fn run(&self, code: i32, args: &[&str]) -> (String, String) {
        let output = self.output(args);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "lacuna {args:?}\n{out}\n{err}");
        (out, err)
    }

    /// Runs a command that prints JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let (out, _) = self.run(0, &[args, &["-o", "json"]].concat());
        serde_json::from_str(&out).unwrap()
    }

    /// Writes the smallest spec that can be run.
    pub fn spec(&self) {
        let text = "schema = 1\nname = \"tiny\"\nbase = \"preset:micro\"\n\
                    [data]\nshards = \"d\"\n[checkpoint]\nto = \"runs\"\n";
        fs::write(self.path("run.toml"), text).unwrap();
    }

    /// Packs `n` made-up images.
    pub fn synthetic(&self, n: &str) {
        let size = ["--size", "8x8", "--channels", "3", "--seed", "3"];
        let place = ["data", "synthetic", "d", "--n", n, "--shard-size", "20KiB"];
        self.run(0, &[&place[..], &size[..]].concat());
    }
}

/// Commits a checkpoint of the spec's model as training does.
pub fn save(desk: &Desk, step: u64, world: u32, salt: f32) {
    let read = |path: &Path| fs::read_to_string(path);
    let spec = lacuna_spec::parse_file(&desk.path("run.toml"), &[], &read).unwrap().spec;
    let dir = RunDir::new(desk.path("runs"), spec.run_id());
    // Claimed by an earlier save already, perhaps.
    let _ = claim(&dir, CoordEpoch(1));
    let layout = Layout::new(spec.model.params());
    let counters = Counters { step, updates: step, ..Counters::fresh(layout.n_blocks(), 16) };
    let section = |k: usize| -> Vec<f32> {
        (0..layout.numel()).map(|i| ((i * 3 + k) as f32 * 0.37).sin() + salt).collect()
    };
    let sections = [section(0), section(1), section(2)];
    let views: [&[f32]; 3] = [&sections[0], &sections[1], &sections[2]];
    let state = StateView::new(&layout, views, &counters).with_tables(&spec.model);
    let partition = Partition::new(&layout, world);
    let attempt = Attempt::new(Generation(1), AttemptSeq(step));
    let write = |rank: u32| {
        let info = PartInfo {
            run: spec.run_id(),
            step: Step(step),
            attempt,
            part: PartId { rank, world },
            state_digest: digest_state(&layout, views, &counters),
            counters: counters.clone(),
            block_bytes: 4096,
        };
        write_part(&dir, &info, &state.part(&partition, rank)).unwrap()
    };
    let receipts: Vec<_> = (0..world).map(write).collect();
    let context = Context {
        step: Step(step),
        attempt,
        coord_epoch: CoordEpoch(1),
        world_size: world,
        created: "2026-01-02T03:04:05Z".to_string(),
        parent: None,
        facts: RunFacts {
            spec_digest: "blake3:00".to_string(),
            data_fingerprint: "11".to_string(),
            seed: 0,
            rng: "philox/1".to_string(),
            build: "lacuna 0.1.0".to_string(),
            probe_class: "cpu-1".to_string(),
            epoch: 2,
            samples: 16 * step,
            loss: Loss::new(0.5, 0.6),
        },
        spec: spec.effective_toml(),
    };
    commit(&dir, &receipts, &context).unwrap();
}
