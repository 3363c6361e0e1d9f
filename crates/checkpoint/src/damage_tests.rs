//! Damage at rest, all of it: every bit, every length, every swap and every loss of a file of a
//! small run. What loads is a whole state of one step; what does not is named.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use lacuna_types::Step;

use crate::catalog;
use crate::chain;
use crate::layout::RunDir;
use crate::load::{Expected, LoadError, load_newest, load_step};
use crate::manifest::Manifest;
use crate::read::{self, BlockReader};
use crate::testing::{BLOCK, manifest, part_path, run_dir, tiny, tree};

const WORLD: u32 = 2;

/// A run with two checkpoints, both read back and marked.
fn run() -> (tempfile::TempDir, RunDir) {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    for step in [3, 5] {
        tiny(step).save(&dir, WORLD);
        catalog::verify_and_mark(&dir, &manifest(&dir, step)).unwrap();
    }
    (root, dir)
}

fn files(dir: &RunDir) -> Vec<PathBuf> {
    tree(&dir.path()).into_iter().map(|(name, _)| dir.path().join(name)).collect()
}

/// Loads as a run that starts again would; returns the step and what was passed over.
fn resume(dir: &RunDir) -> Option<(u64, Vec<String>)> {
    let layout = tiny(0).layout;
    match load_newest(dir, &Expected::tensors(&layout)) {
        Ok(resumed) => resumed.map(|resumed| {
            let step = resumed.state.manifest.step;
            tiny(step).assert_loaded(&resumed.state);
            (step, resumed.skipped.into_iter().map(|skipped| skipped.reason).collect())
        }),
        Err(LoadError::NoneGood { .. }) => None,
        Err(error) => panic!("{}", chain(&error)),
    }
}

/// Files whose loss or damage changes nothing that is loaded.
fn is_harmless(path: &str) -> bool {
    ["receipt-", "latest.json", "verified.json", "claims/"].iter().any(|part| path.contains(part))
}

/// Every bit of both parts: the block that holds it is refused, by file, bytes and tensors.
#[test]
fn every_bit_of_a_part_is_watched() {
    let (_root, dir) = run();
    let manifest = manifest(&dir, 5);
    let mut n_flips: usize = 0;
    for rank in 0..WORLD {
        let path = part_path(&dir, 5, rank, WORLD);
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        let sound = fs::read(&path).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        let mut reader = BlockReader::open(&dir, &manifest, rank).unwrap();
        for (at, byte) in sound.iter().enumerate() {
            let block = at as u64 / BLOCK;
            let bytes = manifest.files[rank as usize].block_range(block);
            let range = format!("bytes {}..{}", bytes.start, bytes.end);
            for bit in 0..8 {
                file.write_all_at(&[byte ^ (1 << bit)], at as u64).unwrap();
                reader.forget();
                let error = reader.block(block).unwrap_err().to_string();
                let named = error.contains(&name) && error.contains(&range);
                assert!(named && error.contains("affects "), "bit {bit} of byte {at}: {error}");
                n_flips += 1;
            }
            file.write_all_at(&[*byte], at as u64).unwrap();
        }
    }
    let n_bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    assert_eq!(n_flips as u64, 8 * n_bytes);
    println!("{n_flips} flips");
}

/// Every bit of a manifest: it is refused, and an older checkpoint loads.
#[test]
fn every_bit_of_a_manifest_is_watched() {
    let (_root, dir) = run();
    let path = dir.manifest(Step(5));
    let sound = fs::read(&path).unwrap();
    for at in 0..sound.len() {
        for bit in 0..8 {
            let mut bytes = sound.clone();
            bytes[at] ^= 1 << bit;
            assert!(Manifest::parse(&bytes).is_err(), "bit {bit} of byte {at}");
        }
    }
    let mut bytes = sound.clone();
    bytes[sound.len() / 2] ^= 1;
    fs::write(&path, bytes).unwrap();
    let (step, skipped) = resume(&dir).unwrap();
    assert_eq!(step, 3);
    assert!(skipped[0].starts_with("checkpoint step 5: manifest.json: "), "{skipped:?}");
}

/// Every length of every file, shorter and longer.
#[test]
fn every_length_is_watched() {
    let (_root, dir) = run();
    for path in files(&dir) {
        let sound = fs::read(&path).unwrap();
        let shown = path.display().to_string();
        let stride = if sound.len() > 8192 { 61 } else { 7 };
        let lengths = (0..sound.len()).step_by(stride).chain([sound.len() - 1]);
        for length in lengths {
            fs::write(&path, &sound[..length]).unwrap();
            check_one_file(&dir, &shown, &format!("cut to {length}"));
        }
        let longer: Vec<u8> = sound.iter().copied().chain([b' ']).collect();
        fs::write(&path, longer).unwrap();
        check_one_file(&dir, &shown, "one byte longer");
        fs::write(&path, sound).unwrap();
    }
    assert_eq!(resume(&dir).unwrap(), (5, vec![]));
}

/// One file of the run is damaged: what loads then, and what is said.
fn check_one_file(dir: &RunDir, path: &str, how: &str) {
    let (step, skipped) = resume(dir).unwrap_or_else(|| panic!("{path} {how}: nothing loads"));
    let name = path.rsplit('/').next().unwrap();
    // A checkpoint without its manifest was never committed; the others are passed over, by name.
    let is_gone = how == "deleted" && name == "manifest.json";
    let is_named = !(is_harmless(path) || is_gone);
    let of_newest = path.contains("step-000000005") && !is_harmless(path);
    assert_eq!(step, if of_newest { 3 } else { 5 }, "{path} {how}: {skipped:?}");
    assert_eq!(skipped.len(), usize::from(is_named), "{path} {how}: {skipped:?}");
    assert!(skipped.iter().all(|reason| reason.contains(name)), "{path} {how}: {skipped:?}");
}

/// Any file is lost.
#[test]
fn every_loss_is_noticed() {
    let (_root, dir) = run();
    for path in files(&dir) {
        let sound = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        check_one_file(&dir, &path.display().to_string(), "deleted");
        fs::write(&path, sound).unwrap();
    }
}

/// Any two files in each other's place, of one step or of two.
#[test]
fn every_swap_is_noticed() {
    let (_root, dir) = run();
    let files = files(&dir);
    let mut loaded: BTreeSet<Option<u64>> = BTreeSet::new();
    for (i, a) in files.iter().enumerate() {
        for b in &files[i + 1..] {
            let (of_a, of_b) = (fs::read(a).unwrap(), fs::read(b).unwrap());
            fs::write(a, &of_b).unwrap();
            fs::write(b, &of_a).unwrap();
            let found = resume(&dir);
            let both = [a, b].map(|path| path.display().to_string());
            let touched = |step: u64| {
                let step = dir.step(Step(step)).display().to_string();
                both.iter().any(|path| path.starts_with(&step) && !is_harmless(path))
            };
            let same = of_a == of_b;
            let want = [5, 3].into_iter().find(|step| same || !touched(*step));
            assert_eq!(found.as_ref().map(|(step, _)| *step), want, "{both:?}: {found:?}");
            loaded.insert(want);
            fs::write(a, of_a).unwrap();
            fs::write(b, of_b).unwrap();
        }
    }
    assert_eq!(loaded, BTreeSet::from([None, Some(3), Some(5)]), "all cases were there");
    assert_eq!(resume(&dir).unwrap(), (5, vec![]));
}

/// A step that was asked for is not replaced by another.
#[test]
fn an_explicit_step_is_not_replaced() {
    let (_root, dir) = run();
    let path = part_path(&dir, 5, 1, WORLD);
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    fs::write(&path, bytes).unwrap();
    let layout = tiny(5).layout;
    let error = load_step(&dir, Step(5), &Expected::tensors(&layout)).unwrap_err();
    assert!(error.to_string().contains("Next good checkpoint: step 3."), "{error}");
    assert_eq!(read::verify(&dir, &manifest(&dir, 5)).problems.len(), 1);
}
