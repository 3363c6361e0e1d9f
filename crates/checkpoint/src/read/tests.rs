use expect_test::expect;

use super::*;
use crate::testing::{manifest, part_path, run_dir, tiny};

fn saved(world: u32) -> (tempfile::TempDir, RunDir, Manifest) {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    tiny(12000).save(&dir, world);
    let manifest = manifest(&dir, 12000);
    (root, dir, manifest)
}

fn want(tensor: &str, range: Range<u64>) -> Wanted {
    Wanted { tensor: tensor.to_string(), range }
}

#[test]
fn plans_cover_with_whole_blocks() {
    let (_root, _dir, manifest) = saved(2);
    let wanted = [want("param/a.weight", 1000..1100), want("param/b.bias", 2..2)];
    let ops = plan(&manifest, &wanted).unwrap();
    let lines: Vec<String> =
        ops.iter().map(|op| format!("{}:{:?}\n  {:?}\n", op.file, op.bytes, op.copies)).collect();
    expect![[r#"
        0:15000..16396
          [Copy { at: 16288..16384, wanted: 0, dst: 0 }]
        1:4500..6000
          [Copy { at: 5592..5896, wanted: 0, dst: 96 }]
    "#]]
    .assert_eq(&lines.concat());
    for op in &ops {
        let file = &manifest.files[op.file as usize];
        assert!(op.bytes.start.is_multiple_of(file.block));
        assert!(op.bytes.end.is_multiple_of(file.block) || op.bytes.end == file.bytes);
    }
}

#[test]
fn what_is_not_there_cannot_be_planned() {
    let (_root, _dir, manifest) = saved(1);
    let error = |wanted: Wanted| plan(&manifest, &[wanted]).unwrap_err().to_string();
    expect!["checkpoint step 12000 has no tensor `param/x`"]
        .assert_eq(&error(want("param/x", 0..1)));
    expect!["checkpoint step 12000: `param/b.bias` has no elements 6..8"]
        .assert_eq(&error(want("param/b.bias", 6..8)));
}

/// Every range of a small tensor and many of a large one, at every world size.
#[test]
fn any_range_can_be_read() {
    for world in 1..=4 {
        let (_root, dir, manifest) = saved(world);
        let state = tiny(12000);
        let mut reader = Reader::new(&dir, &manifest);
        for (name, block, stride) in [("a.weight", 0, 137), ("b.bias", 1, 1)] {
            let values = &state.sections[0][state.layout.range(block)];
            for start in (0..values.len()).step_by(stride) {
                for end in (start..=values.len()).step_by(stride) {
                    let tensor = format!("param/{name}");
                    let wanted = [want(&tensor, start as u64..end as u64)];
                    let ops = plan(&manifest, &wanted).unwrap();
                    let mut found: Vec<f32> = vec![0.0; end - start];
                    let buffer: &mut [u8] = bytemuck::cast_slice_mut(&mut found);
                    reader.read_into(&ops, &mut [buffer]).unwrap();
                    assert_eq!(found, values[start..end]);
                }
            }
        }
    }
}

#[test]
fn verification_lists_all_damage() {
    let (_root, dir, manifest) = saved(2);
    assert_eq!(verify(&dir, &manifest).problems, [""; 0]);
    for (rank, places) in [(0, &[4200usize, 9000][..]), (1, &[4400])] {
        let path = part_path(&dir, 12000, rank, 2);
        let mut bytes = std::fs::read(&path).unwrap();
        places.iter().for_each(|at| bytes[*at] ^= 4);
        std::fs::write(&path, bytes).unwrap();
    }
    let report = verify(&dir, &manifest).problems.join("\n") + "\n";
    let report = report.replace(": bytes ", ":\n  bytes ").replace(" (aff", "\n  (aff");
    expect![[r#"
        checkpoint step 12000: part-00000-of-00002.safetensors is damaged:
          bytes 3000..4500 have CRC 1c342552e34a84a2, manifest says 20820b371bfeeb2a
          (affects adamw.exp_avg/a.weight elements 0..101)
        checkpoint step 12000: part-00000-of-00002.safetensors is damaged:
          bytes 9000..10500 have CRC 46b6e1ae8083ebb5, manifest says c62efb276739d8a5
          (affects adamw.exp_avg_sq/a.weight elements 202..577)
        checkpoint step 12000: part-00001-of-00002.safetensors is damaged:
          bytes 3000..4500 have CRC 9072c1ef0c02e5e0, manifest says ef433fa73491596e
          (affects adamw.exp_avg/a.weight elements 1024..1125)
    "#]]
    .assert_eq(&report);
}

/// Bytes between pieces count, pieces may touch, be empty, or be wanted twice.
#[test]
fn digests_of_pieces_are_those_of_their_bytes() {
    let block: Vec<u8> = (0..5000u32).map(|i| (i * i) as u8).collect();
    let lists: [&[Range<usize>]; 5] = [
        &[],
        &[0..40, 40..5000],
        &[3..3, 8..700, 700..701, 4000..4999],
        &[0..9, 4..12],
        &[7..9, 7..9],
    ];
    for pieces in lists {
        let (whole, digests) = digest_pieces(&block, pieces);
        assert_eq!(whole, Crc64::of(&block), "{pieces:?}");
        let want: Vec<Crc64> = pieces.iter().map(|p| Crc64::of(&block[p.clone()])).collect();
        assert_eq!(digests, want, "{pieces:?}");
    }
}
