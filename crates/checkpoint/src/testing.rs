//! Small states and whole saves for the tests of this crate.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lacuna_recipe::model::{Init, ModelConfig, ParamSpec};
use lacuna_recipe::state::{Counters, Layout};
use lacuna_types::{AttemptSeq, CoordEpoch, Generation, Step};

use crate::commit::{Committed, Context, claim, commit};
use crate::layout::{Attempt, PartId, RunDir};
use crate::load::LoadedState;
use crate::manifest::{Loss, Manifest, RunFacts};
use crate::partition::Partition;
use crate::state::{StateView, digest_state};
use crate::write::{PartInfo, Receipt, write_part};

/// A time of day.
pub const NOW: &str = "2026-11-28T10:00:00Z";

/// Blocks small enough that tiny files have several.
pub const BLOCK: u64 = 1500;

pub struct Sample {
    pub layout: Arc<Layout>,
    pub config: Option<ModelConfig>,
    pub sections: [Vec<f32>; 3],
    pub counters: Counters,
}

pub fn sample(layout: Arc<Layout>, step: u64) -> Sample {
    let value = |i: usize, salt: u64| ((i as f32 + 0.5) * 0.37).sin() + (salt + step) as f32;
    let section = |salt: u64| (0..layout.numel()).map(|i| value(i, salt)).collect();
    let counters = Counters {
        step,
        updates: step,
        exponents: (0..layout.n_blocks()).map(|i| 30 + i as i32).collect(),
        exponent_version: 2,
        ..Counters::fresh(layout.n_blocks(), 32)
    };
    Sample { sections: [section(1), section(2), section(3)], layout, config: None, counters }
}

/// 1,211 parameters: two ranks have something to write, a third has not.
pub fn tiny(step: u64) -> Sample {
    let param = |name: &str, shape: &[usize]| ParamSpec {
        name: name.to_string(),
        shape: shape.to_vec(),
        init: Init::Zeros,
    };
    let params = [param("a.weight", &[40, 30]), param("b.bias", &[7]), param("c", &[2, 2])];
    sample(Layout::new(params.to_vec()), step)
}

pub fn micro(step: u64) -> Sample {
    let config = ModelConfig::preset("micro").unwrap();
    let sample = sample(Layout::new(config.params()), step);
    Sample { config: Some(config), ..sample }
}

impl Sample {
    pub fn views(&self) -> [&[f32]; 3] {
        [&self.sections[0], &self.sections[1], &self.sections[2]]
    }

    pub fn view(&self) -> StateView<'_> {
        let view = StateView::new(&self.layout, self.views(), &self.counters);
        self.config.iter().fold(view, |view, config| view.with_tables(config))
    }

    pub fn digest(&self) -> u64 {
        digest_state(&self.layout, self.views(), &self.counters)
    }

    pub fn info(&self, attempt: Attempt, part: PartId) -> PartInfo {
        PartInfo {
            run: "r-7f3a".parse().unwrap(),
            step: Step(self.counters.step),
            attempt,
            part,
            state_digest: self.digest(),
            counters: self.counters.clone(),
            block_bytes: BLOCK,
        }
    }

    pub fn write(&self, dir: &RunDir, attempt: Attempt, world: u32) -> Vec<Receipt> {
        self.write_in_blocks(dir, attempt, world, BLOCK)
    }

    fn write_in_blocks(
        &self,
        dir: &RunDir,
        attempt: Attempt,
        world: u32,
        block_bytes: u64,
    ) -> Vec<Receipt> {
        let partition = Partition::new(&self.layout, world);
        let view = self.view();
        let write = |rank: u32| {
            let info = self.info(attempt, PartId { rank, world });
            let info = PartInfo { block_bytes, ..info };
            write_part(dir, &info, &view.part(&partition, rank)).unwrap()
        };
        (0..world).map(write).collect()
    }

    pub fn context(&self, attempt: Attempt, world_size: u32) -> Context {
        Context {
            step: Step(self.counters.step),
            attempt,
            coord_epoch: CoordEpoch(7),
            world_size,
            created: "2026-11-23T22:31:04Z".to_string(),
            parent: None,
            facts: RunFacts {
                spec_digest: "blake3:0011".to_string(),
                data_fingerprint: "blake3:2233".to_string(),
                seed: 42,
                rng: "philox/1".to_string(),
                build: "lacuna 0.1.0".to_string(),
                probe_class: "cpu-1".to_string(),
                epoch: 3,
                samples: 32 * self.counters.step,
                loss: Loss::new(0.41, 0.413),
            },
            spec: "[model]\npreset = \"micro\"\n".to_string(),
        }
    }

    /// Writes all parts and commits them.
    pub fn save(&self, dir: &RunDir, world: u32) -> Committed {
        self.save_in_blocks(dir, world, BLOCK)
    }

    /// The same with larger blocks.
    pub fn save_in_blocks(&self, dir: &RunDir, world: u32, block_bytes: u64) -> Committed {
        let attempt = attempt(1);
        let receipts = self.write_in_blocks(dir, attempt, world, block_bytes);
        commit(dir, &receipts, &self.context(attempt, world)).unwrap()
    }

    pub fn assert_loaded(&self, loaded: &LoadedState) {
        let bits = |s: &[f32]| s.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        for (want, found) in self.sections.iter().zip(&loaded.sections) {
            assert_eq!(bits(want), bits(found));
        }
        assert_eq!(loaded.counters, self.counters);
    }
}

pub fn attempt(sequence: u64) -> Attempt {
    Attempt::new(Generation(12), AttemptSeq(sequence))
}

/// A fresh run directory with coordinator epoch 7 claimed.
pub fn run_dir(root: &Path) -> RunDir {
    let dir = RunDir::new(root, "r-7f3a".parse().unwrap());
    claim(&dir, CoordEpoch(7)).unwrap();
    dir
}

pub fn manifest(dir: &RunDir, step: u64) -> Manifest {
    Manifest::parse(&std::fs::read(dir.manifest(Step(step))).unwrap()).unwrap()
}

pub fn part_path(dir: &RunDir, step: u64, rank: u32, world: u32) -> PathBuf {
    dir.attempt(Step(step), attempt(1)).join(PartId { rank, world }.file_name())
}

/// All files under a directory with their content, by relative path.
pub fn tree(root: &Path) -> Vec<(String, Vec<u8>)> {
    let mut out: Vec<(String, Vec<u8>)> = Vec::new();
    let mut open: Vec<PathBuf> = vec![root.to_path_buf()];
    while let Some(path) = open.pop() {
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(root).unwrap().display().to_string();
                out.push((name, std::fs::read(&path).unwrap()));
            }
        }
    }
    out.sort();
    out
}
