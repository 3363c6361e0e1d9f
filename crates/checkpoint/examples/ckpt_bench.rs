//! Saves and loads a checkpoint beside raw direct writes and reads of as many bytes on one disk.
//!
//! ```text
//! ckpt_bench FOLDER [--preset base] [--rounds 3] [--first raw|ours]
//! ```
//!
//! One writer. A save is a part with its digests, its receipt and the commit, all durable (the
//! digest of the whole state is known by then, since the snapshot was taken); a load reads every
//! byte into memory that exists, and compares every digest, and the state's. Raw is 16 MiB at a
//! time with O_DIRECT, and a sync. Each round does all four twice, in the one order and in the
//! other, on fresh files that are not in the page cache, and waits before each until the device has
//! done what was asked of it before, such as discarding the blocks of removed files. Prints one
//! JSON line: GB/s (10^9 bytes) of each round, both times together.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use lacuna_checkpoint::commit::{Context, claim, commit};
use lacuna_checkpoint::layout::{Attempt, PartId, RunDir};
use lacuna_checkpoint::load::{Expected, find_step, load_into};
use lacuna_checkpoint::manifest::{Loss, RunFacts};
use lacuna_checkpoint::partition::Partition;
use lacuna_checkpoint::state::{StateView, digest_state};
use lacuna_checkpoint::write::{BLOCK_BYTES, PartInfo, write_part};
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::{Counters, Layout};
use lacuna_types::{AttemptSeq, CoordEpoch, Generation, Step};
use rustix::fs::{Advice, FallocateFlags, OFlags, fadvise, fallocate};

const PIECE_BYTES: usize = 16 << 20;
const PAGE: usize = 4096;

struct Args {
    folder: PathBuf,
    preset: String,
    rounds: u64,
    ours_first: bool,
}

fn parse() -> Result<Args, Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let folder = PathBuf::from(words.next().ok_or("usage: ckpt_bench FOLDER")?);
    let mut args = Args { folder, preset: "base".to_string(), rounds: 3, ours_first: false };
    while let Some(flag) = words.next() {
        let value = words.next().ok_or_else(|| format!("`{flag}` needs a value"))?;
        match flag.as_str() {
            "--preset" => args.preset = value,
            "--rounds" => args.rounds = value.parse()?,
            "--first" => args.ours_first = value == "ours",
            _ => return Err(format!("`{flag}` is not known").into()),
        }
    }
    Ok(args)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = parse()?;
    let config = ModelConfig::preset(&args.preset).ok_or("there is no such preset")?;
    let layout = Layout::new(config.params());
    let section =
        |k: usize| (0..layout.numel()).map(|i| ((i + k) as f32).sqrt()).collect::<Vec<f32>>();
    let sections = [section(0), section(1), section(2)];
    let views = [&sections[0][..], &sections[1], &sections[2]];
    let digest = digest_state(&layout, views, &counters(&layout));
    let loaded = sections.clone();
    let mut bench =
        Bench { folder: args.folder, config, layout, sections, digest, loaded, n_saves: 0 };
    let bytes = 12 * bench.layout.numel();
    let mut rates: [Vec<f64>; 4] = Default::default();
    for _ in 0..args.rounds {
        // Once in each order, so that neither is the one that finds a rested device.
        let (mut raw, mut ours) = ([0.0; 2], [0.0; 2]);
        for raw_comes in [!args.ours_first, args.ours_first, args.ours_first, !args.ours_first] {
            let (took, sum) =
                if raw_comes { (bench.raw(bytes)?, &mut raw) } else { (bench.ours()?, &mut ours) };
            sum.iter_mut().zip(took).for_each(|(sum, took)| *sum += took);
        }
        for (rates, took) in rates.iter_mut().zip([raw[0], raw[1], ours[0], ours[1]]) {
            rates.push(2.0 * bytes as f64 / 1e9 / took);
        }
    }
    let list = |rates: &[f64]| {
        rates.iter().map(|rate| format!("{rate:.3}")).collect::<Vec<String>>().join(", ")
    };
    let [raw_write, raw_read, save, load] = rates.each_ref().map(|rates| list(rates));
    println!(
        "{{\"bytes\": {bytes}, \"raw_write\": [{raw_write}], \"raw_read\": [{raw_read}], \
         \"save\": [{save}], \"load\": [{load}]}}"
    );
    Ok(())
}

/// What is saved, and where.
struct Bench {
    folder: PathBuf,
    config: ModelConfig,
    layout: Arc<Layout>,
    sections: [Vec<f32>; 3],
    digest: u64,
    loaded: [Vec<f32>; 3],
    n_saves: u32,
}

impl Bench {
    /// Writes and reads as many bytes; returns the seconds of each.
    fn raw(&self, bytes: usize) -> Result<[f64; 2], Box<dyn Error>> {
        let path = self.folder.join("raw");
        let took = [timed(|| write_raw(&path, bytes))?, timed(|| read_raw(&path, bytes))?];
        std::fs::remove_file(&path)?;
        Ok(took)
    }

    /// Saves and loads the state; returns the seconds of each.
    fn ours(&mut self) -> Result<[f64; 2], Box<dyn Error>> {
        self.n_saves += 1;
        let dir = RunDir::new(&self.folder, format!("bench-{}", self.n_saves).parse()?);
        claim(&dir, CoordEpoch(1))?;
        let (config, layout, sections) = (&self.config, &self.layout, &self.sections);
        let saved = timed(|| save(&dir, config, layout, sections, self.digest))?;
        forget(&dir.path())?;
        let expected = Expected::tensors(layout);
        let loaded = &mut self.loaded;
        loaded.iter_mut().for_each(|section| section.fill(0.0));
        let read = timed(|| {
            let manifest = find_step(&dir, Step(1))?;
            load_into(&dir, &manifest, &expected, &mut |section, at, values: &[f32]| {
                loaded[section as usize][at..at + values.len()].copy_from_slice(values);
            })?;
            Ok(())
        })?;
        assert!(self.loaded == self.sections, "the state is as it was saved");
        std::fs::remove_dir_all(dir.path())?;
        Ok([saved, read])
    }
}

/// Returns the seconds that `act` takes, begun when the device has done what it was told before.
fn timed(act: impl FnOnce() -> Result<(), Box<dyn Error>>) -> Result<f64, Box<dyn Error>> {
    rustix::fs::sync();
    let start = Instant::now();
    act()?;
    Ok(start.elapsed().as_secs_f64())
}

fn open(path: &Path, write: bool) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.custom_flags(OFlags::DIRECT.bits() as i32);
    if write {
        options.write(true).create_new(true)
    } else {
        options.read(true)
    };
    options.open(path)
}

fn write_raw(path: &Path, bytes: usize) -> Result<(), Box<dyn Error>> {
    let file = open(path, true)?;
    fallocate(&file, FallocateFlags::empty(), 0, bytes as u64)?;
    let mut memory: Vec<u8> = vec![0; PIECE_BYTES + PAGE];
    let start = memory.as_ptr().align_offset(PAGE);
    // As hard to compress as a state, for storage that does that.
    for (i, value) in memory[start..start + PIECE_BYTES].chunks_exact_mut(4).enumerate() {
        value.copy_from_slice(&(i as f32).sqrt().to_le_bytes());
    }
    for at in (0..bytes).step_by(PIECE_BYTES) {
        let n = (bytes - at).min(PIECE_BYTES).next_multiple_of(PAGE);
        file.write_all_at(&memory[start..start + n], at as u64)?;
    }
    Ok(file.sync_all()?)
}

fn read_raw(path: &Path, bytes: usize) -> Result<(), Box<dyn Error>> {
    let file = open(path, false)?;
    let mut memory: Vec<u8> = vec![0; PIECE_BYTES + PAGE];
    let start = memory.as_ptr().align_offset(PAGE);
    for at in (0..bytes).step_by(PIECE_BYTES) {
        let n = (bytes - at).min(PIECE_BYTES).next_multiple_of(PAGE);
        file.read_exact_at(&mut memory[start..start + n], at as u64)?;
    }
    Ok(())
}

fn counters(layout: &Layout) -> Counters {
    Counters { step: 1, updates: 1, ..Counters::fresh(layout.n_blocks(), 64) }
}

fn save(
    dir: &RunDir,
    config: &ModelConfig,
    layout: &Layout,
    sections: &[Vec<f32>; 3],
    digest: u64,
) -> Result<(), Box<dyn Error>> {
    let counters = counters(layout);
    let views = [&sections[0][..], &sections[1], &sections[2]];
    let attempt = Attempt::new(Generation(1), AttemptSeq(1));
    let info = PartInfo {
        run: dir.run().clone(),
        step: Step(1),
        attempt,
        part: PartId { rank: 0, world: 1 },
        state_digest: digest,
        counters: counters.clone(),
        block_bytes: BLOCK_BYTES,
    };
    let state = StateView::new(layout, views, &counters).with_tables(config);
    let receipt = write_part(dir, &info, &state.part(&Partition::new(layout, 1), 0))?;
    let facts = RunFacts {
        spec_digest: String::new(),
        data_fingerprint: String::new(),
        seed: 0,
        rng: String::new(),
        build: String::new(),
        probe_class: String::new(),
        epoch: 0,
        samples: 0,
        loss: Loss::default(),
    };
    let context = Context {
        step: Step(1),
        attempt,
        coord_epoch: CoordEpoch(1),
        world_size: 1,
        created: String::new(),
        parent: None,
        facts,
        spec: String::new(),
    };
    commit(dir, &[receipt], &context)?;
    Ok(())
}

/// Drops the files below a folder from the page cache.
fn forget(folder: &Path) -> Result<(), Box<dyn Error>> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            forget(&path)?;
        } else {
            fadvise(&File::open(&path)?, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}
