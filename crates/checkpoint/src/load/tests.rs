use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use expect_test::expect;
use lacuna_recipe::model::{Init, ModelConfig, ParamSpec};
use lacuna_types::CoordEpoch;

use super::*;
use crate::chain;
use crate::commit::claim;
use crate::storage::Disk;
use crate::storage::model::ModelFs;
use crate::testing::{manifest, micro, part_path, run_dir, sample, tiny};

/// The message of a failed load, broken into lines for the page.
fn load_text(dir: &RunDir, step: u64, layout: &Layout) -> String {
    let text = chain(&load_step(dir, Step(step), &Expected::tensors(layout)).unwrap_err());
    broken(&text)
}

fn broken(text: &str) -> String {
    [
        "bytes ",
        "(affects ",
        "adamw.exp_avg/b",
        "adamw.exp_avg_sq/a",
        "adamw.exp_avg_sq/b",
        "param/a",
        "content ",
        "Next ",
        "Run ",
        "`self` says ",
    ]
    .iter()
    .fold(text.to_string(), |text, at| text.replace(&format!(" {at}"), &format!("\n  {at}")))
        + "\n"
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

/// Save at N, load, save at M, load, for all N and M up to 16: the same bits, the same digests.
#[test]
fn states_survive_any_change_of_world_size() {
    let state = micro(4);
    let expected = Expected::tensors(&state.layout);
    let fresh = || {
        let fs = ModelFs::from(ModelFs::new("/store").world());
        let storage = Arc::new(Disk::over(Arc::new(fs)));
        let dir = RunDir::on(storage, "/store", "r-7f3a".parse().unwrap());
        claim(&dir, CoordEpoch(7)).unwrap();
        dir
    };
    let crc = |m: &Manifest| m.tensors.values().map(|t| t.crc64).collect::<Vec<_>>();
    for n in 1..=16 {
        let dir = fresh();
        state.save(&dir, n);
        let loaded = load_step(&dir, Step(4), &expected).unwrap();
        state.assert_loaded(&loaded);
        let mut again = micro(4);
        again.sections.clone_from(&loaded.sections);
        again.counters.clone_from(&loaded.counters);
        for m in 1..=16 {
            let dir = fresh();
            again.save(&dir, m);
            let reloaded = load_step(&dir, Step(4), &expected).unwrap();
            state.assert_loaded(&reloaded);
            assert_eq!(reloaded.manifest.state_digest, loaded.manifest.state_digest);
            assert_eq!(crc(&reloaded.manifest), crc(&loaded.manifest));
        }
    }
}

/// A state that several threads read: the same bytes, and damage anywhere is told as ever.
#[test]
fn large_states_are_read_in_lanes() {
    let param = |name: &str, n: usize| ParamSpec {
        name: name.to_string(),
        shape: vec![n],
        init: Init::Zeros,
    };
    let layout = Layout::new(vec![param("a", 1_500_000), param("b", 7), param("c", 1_600_000)]);
    let state = sample(layout, 3);
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    state.save_in_blocks(&dir, 3, 1 << 20);
    let manifest = manifest(&dir, 3);
    let expected = Expected::tensors(&state.layout);
    state.assert_loaded(&load(&dir, &manifest, &expected).unwrap());
    let found = read::verify(&dir, &manifest);
    assert_eq!(found.bytes, manifest.files.iter().map(|file| file.bytes).sum::<u64>());
    assert_eq!(found.problems, [""; 0]);
    for rank in [2, 0] {
        let path = part_path(&dir, 3, rank, 3);
        edit(&path, |bytes| bytes[5_000_000] ^= 1);
        let text = chain(&load(&dir, &manifest, &expected).unwrap_err());
        let named =
            format!("part-0000{rank}-of-00003.safetensors is damaged: bytes 4194304..5242880");
        assert!(text.contains(&named), "the first that is met is told: {text}");
    }
    let problems = read::verify(&dir, &manifest).problems;
    assert_eq!(problems.len(), 2, "all are listed: {problems:?}");
    std::fs::remove_file(part_path(&dir, 3, 1, 3)).unwrap();
    let problems = read::verify(&dir, &manifest).problems;
    assert!(problems.len() == 3 && problems[0].contains("part-00001"), "{problems:?}");
}

/// Every byte of every part, and every length at a stride: detected, or the state is untouched.
#[test]
fn damage_of_parts_is_never_loaded() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = tiny(3);
    state.save(&dir, 2);
    let manifest = manifest(&dir, 3);
    let expected = Expected::tensors(&state.layout);
    let mut n_harmless: usize = 0;
    for rank in 0..2 {
        let path = part_path(&dir, 3, rank, 2);
        let sound = std::fs::read(&path).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        for (at, byte) in sound.iter().enumerate() {
            file.write_all_at(&[byte ^ (1 << (at % 8))], at as u64).unwrap();
            if at % 50 == 0 {
                assert_eq!(read::verify(&dir, &manifest).problems.len(), 1, "byte {at}");
            }
            match load(&dir, &manifest, &expected) {
                Err(error) => {
                    let reason = error.to_string();
                    assert!(reason.contains(" is damaged: bytes "), "{reason}");
                }
                Ok(loaded) => {
                    // Blocks of the header alone are not read.
                    n_harmless += 1;
                    state.assert_loaded(&loaded);
                }
            }
            file.write_all_at(&[*byte], at as u64).unwrap();
        }
        for len in (0..sound.len()).step_by(97) {
            std::fs::write(&path, &sound[..len]).unwrap();
            assert!(load(&dir, &manifest, &expected).is_err(), "cut to {len}");
        }
        let longer: Vec<u8> = sound.iter().copied().chain([0]).collect();
        std::fs::write(&path, longer).unwrap();
        assert!(load(&dir, &manifest, &expected).is_err());
        std::fs::write(&path, sound).unwrap();
    }
    // Two blocks of 1,500 bytes hold nothing but header in each of the two files.
    assert_eq!(n_harmless, 2 * 2 * 1500);
    state.assert_loaded(&load(&dir, &manifest, &expected).unwrap());
}

#[test]
fn damage_is_explained() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    tiny(11000).save(&dir, 2);
    let state = tiny(12000);
    state.save(&dir, 2);
    let (a, b) = (part_path(&dir, 12000, 0, 2), part_path(&dir, 12000, 1, 2));
    let sound = std::fs::read(&a).unwrap();
    edit(&a, |bytes| bytes[6100] ^= 0x10);
    expect![[r#"
        checkpoint step 12000: part-00000-of-00002.safetensors is damaged:
          bytes 6000..7500 have CRC 69c55cb507d6fa3f, manifest says 86a067043ddfc254
          (affects adamw.exp_avg/a.weight elements 476..851).
          Next good checkpoint: step 11000.
          Run 'lacuna ckpt verify --step 12000' for a full report.
    "#]]
    .assert_eq(&load_text(&dir, 12000, &state.layout));
    edit(&a, |bytes| bytes.truncate(100));
    expect![[r#"
        checkpoint step 12000: part-00000-of-00002.safetensors has 100 bytes, manifest says 16396
          (affects adamw.exp_avg/a.weight elements 0..1024,
          adamw.exp_avg_sq/a.weight elements 0..1024,
          param/a.weight elements 0..1024, reduce.exponents elements 0..3).
          Next good checkpoint: step 11000.
          Run 'lacuna ckpt verify --step 12000' for a full report.
    "#]]
    .assert_eq(&load_text(&dir, 12000, &state.layout));
    std::fs::remove_file(&a).unwrap();
    expect![[r#"
        checkpoint step 12000: part-00000-of-00002.safetensors is missing
          (affects adamw.exp_avg/a.weight elements 0..1024,
          adamw.exp_avg_sq/a.weight elements 0..1024,
          param/a.weight elements 0..1024, reduce.exponents elements 0..3).
          Next good checkpoint: step 11000.
          Run 'lacuna ckpt verify --step 12000' for a full report.
    "#]]
    .assert_eq(&load_text(&dir, 12000, &state.layout));
    // Swapped parts.
    std::fs::rename(&b, &a).unwrap();
    std::fs::write(&b, &sound).unwrap();
    expect![[r#"
        checkpoint step 12000: part-00000-of-00002.safetensors has 6340 bytes, manifest says 16396
          (affects adamw.exp_avg/a.weight elements 0..1024,
          adamw.exp_avg_sq/a.weight elements 0..1024,
          param/a.weight elements 0..1024, reduce.exponents elements 0..3).
          Next good checkpoint: step 11000.
          Run 'lacuna ckpt verify --step 12000' for a full report.
    "#]]
    .assert_eq(&load_text(&dir, 12000, &state.layout));
    expect![[r#"
        there is no checkpoint at step 13000
    "#]]
    .assert_eq(&load_text(&dir, 13000, &state.layout));
}

#[test]
fn a_part_of_another_step_is_not_loaded() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    tiny(11000).save(&dir, 2);
    let state = tiny(12000);
    state.save(&dir, 2);
    std::fs::copy(part_path(&dir, 11000, 1, 2), part_path(&dir, 12000, 1, 2)).unwrap();
    let text = load_text(&dir, 12000, &state.layout);
    assert!(text.contains("part-00001-of-00002.safetensors is damaged"), "{text}");
    assert!(text.contains("Next good checkpoint: step 11000."), "{text}");
}

#[test]
fn resuming_falls_back_and_says_why() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let expected_layout = tiny(0).layout;
    let expected = Expected::tensors(&expected_layout);
    assert_eq!(load_newest(&dir, &expected).unwrap(), None, "a run that never saved");
    for step in [3, 6, 9, 12] {
        tiny(step).save(&dir, 2);
    }
    edit(&dir.manifest(Step(12)), |bytes| bytes[40] ^= 1);
    edit(&part_path(&dir, 9, 0, 2), |bytes| bytes[7000] ^= 1);
    std::fs::remove_file(part_path(&dir, 6, 1, 2)).unwrap();
    let resumed = load_newest(&dir, &expected).unwrap().unwrap();
    tiny(3).assert_loaded(&resumed.state);
    let lines: Vec<String> =
        resumed.skipped.iter().map(|s| format!("{}: {}", s.step, broken(&s.reason))).collect();
    expect![[r#"
        12: checkpoint step 12: manifest.json:
          content is blake3:634a5f55d1549e4d124ecbedc2c8927961b7c449c06099cc045a89bfb7216d42,
          `self` says blake3:62f16e2f786fce597d8f3ccb248d0dc1687c1e5fce3f223874b684ad310c9724
        9: checkpoint step 9: part-00000-of-00002.safetensors is damaged:
          bytes 6000..7500 have CRC bda14bc358616c85, manifest says 6f43ddcba0375846
          (affects adamw.exp_avg/a.weight elements 476..851)
        6: checkpoint step 6: part-00001-of-00002.safetensors is missing
          (affects adamw.exp_avg/a.weight elements 1024..1200,
          adamw.exp_avg/b.bias elements 0..7, adamw.exp_avg/c elements 0..4,
          adamw.exp_avg_sq/a.weight elements 1024..1200,
          adamw.exp_avg_sq/b.bias elements 0..7, adamw.exp_avg_sq/c elements 0..4 and 3 more)
    "#]]
    .assert_eq(&lines.concat());
    std::fs::remove_file(part_path(&dir, 3, 0, 2)).unwrap();
    let error = load_newest(&dir, &expected).unwrap_err();
    assert!(matches!(&error, LoadError::NoneGood { skipped } if skipped.len() == 4), "{error}");
}

#[test]
fn every_mismatch_is_listed() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    micro(3).save(&dir, 1);
    let mut config = ModelConfig::preset("micro").unwrap();
    config.decoder_depth = 2;
    config.patch_size = 4;
    let layout = Layout::new(config.params());
    let expected = Expected { seed: Some(43), ..Expected::tensors(&layout) };
    let error = load_newest(&dir, &expected).unwrap_err();
    let text: Vec<String> = chain(&error).lines().take(8).map(|line| format!("{line}\n")).collect();
    expect![[r#"
        checkpoint step 3 does not fit:
          seed is 42, this run's is 43
          param/decoder_blocks.1.attn.proj.bias [8] is missing
          param/decoder_blocks.1.attn.proj.weight [8, 8] is missing
          param/decoder_blocks.1.attn.qkv.bias [24] is missing
          param/decoder_blocks.1.attn.qkv.weight [24, 8] is missing
          param/decoder_blocks.1.mlp.fc1.bias [32] is missing
          param/decoder_blocks.1.mlp.fc1.weight [32, 8] is missing
    "#]]
    .assert_eq(&text.concat());
}

/// Whoever needs parameters only reads no moments, and none that he does not want.
#[test]
fn parameters_are_loaded_alone() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let state = tiny(4);
    state.save(&dir, 2);
    let manifest = manifest(&dir, 4);
    let load =
        |wanted: &dyn Fn(&ParamSpec) -> bool| load_params(&dir, &manifest, &state.layout, wanted);
    assert_eq!(load(&|_| true).unwrap(), state.sections[0]);
    let some = load(&|param| param.name == "c").unwrap();
    let place = state.layout.range(state.layout.find("c").unwrap());
    assert_eq!(some[place.clone()], state.sections[0][place.clone()]);
    assert!(some[..place.start].iter().all(|&x| x == 0.0));
    // Of another model, what is wanted must be there.
    let other = Layout::new(vec![
        ParamSpec { name: "b.bias".into(), shape: vec![7], init: Init::Zeros },
        ParamSpec { name: "d".into(), shape: vec![2], init: Init::Zeros },
    ]);
    let found = load_params(&dir, &manifest, &other, |param| param.name == "b.bias").unwrap();
    assert_eq!(found[..7], state.sections[0][state.layout.range(1)]);
    let error = load_params(&dir, &manifest, &other, |_| true).unwrap_err();
    assert_eq!(chain(&error), "checkpoint step 4 does not fit:\n  param/d [2] is missing");
    // A damaged block is found.
    let slice = &manifest.tensors["param/a.weight"].slices[0];
    let at = slice.at[0] as usize + 8;
    edit(&part_path(&dir, 4, slice.file, 2), |bytes| bytes[at] ^= 1);
    let error = chain(&load(&|_| true).expect_err("the block is damaged"));
    assert!(error.contains("param/a.weight") && error.contains("lacuna ckpt verify"), "{error}");
}
