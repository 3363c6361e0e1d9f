//! Damaged images in the data: a run of any workers replaces them alike and says where they lie.

use std::os::unix::fs::FileExt as _;

use lacuna_data::dataset::{Dataset, SamplePlace};
use lacuna_data::loader::BAD_IN_ROW_MAX;
use lacuna_tests::{Cluster, Fixture, Seen, said};
use lacuna_types::SampleId;

use crate::{fixture, golden_image, photographs};

/// All samples of the photographs are one step, so each is met in each epoch.
const PHOTOGRAPHS: u64 = 42;
const EPOCHS: u64 = 3;

/// Overwrites the second half of a packed sample's bytes.
fn overwrite(dataset: &Dataset, id: SampleId, bytes: impl Fn(u32) -> u8) {
    let (place, record) = (dataset.place(id), dataset.index().record(id));
    let half = record.bytes / 2;
    let bytes: Vec<u8> = (half..record.bytes).map(bytes).collect();
    let shard = std::fs::File::options().write(true).open(&place.shard).unwrap();
    shard.write_all_at(&bytes, place.offset + u64::from(half)).unwrap();
}

/// Indexes shards as they are now: what is damaged in them is the data then.
fn index_again(fixture: &Fixture, folder: &str, n_samples: u64) {
    std::fs::remove_file(fixture.path(folder).join("index.lacuna")).unwrap();
    let (code, out, err) = said(&fixture.run(&["data", "index", folder]));
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(Dataset::open(&fixture.path(folder)).unwrap().n_samples(), n_samples);
}

/// Beginnings of a picture inside of it.
fn beginnings(i: u32) -> u8 {
    if i.is_multiple_of(2) { 0xff } else { 0xc0 }
}

/// Packs photographs of which four are damaged, each in its own way; returns where those lie.
fn pack_damaged(fixture: &Fixture) -> Vec<SamplePlace> {
    let images = photographs(fixture);
    let mut cut = std::fs::read(golden_image("photo-420.jpg")).unwrap();
    cut.truncate(cut.len() / 2);
    std::fs::write(images.join("cut.jpg"), cut).unwrap();
    let mut lies = std::fs::read(golden_image("alpha.png")).unwrap();
    lies[18] ^= 1; // A width of 256 pixels more or less.
    std::fs::write(images.join("lies.png"), lies).unwrap();
    let (code, out, err) = said(&fixture.run(&["data", "pack", "photographs", "jpegs"]));
    assert_eq!(code, 0, "{out}{err}");
    let dataset = Dataset::open(&fixture.path("jpegs")).unwrap();
    assert_eq!(dataset.n_samples(), PHOTOGRAPHS, "packing takes what has a header: {out}{err}");
    let find = |stem: &str| {
        let places = (0..PHOTOGRAPHS).map(|id| dataset.place(SampleId(id)));
        let is_it = |place: &SamplePlace| place.member.as_ref().is_some_and(|m| m.contains(stem));
        places.into_iter().find(is_it).expect("it was packed")
    };
    let bad = ["cut", "lies", "photo-420-3", "progressive-5"].map(find);
    overwrite(&dataset, bad[2].sample, beginnings);
    overwrite(&dataset, bad[3].sample, beginnings);
    index_again(fixture, "jpegs", PHOTOGRAPHS);
    bad.into()
}

fn trained(fixture: &Fixture, name: &str, n: usize) -> Seen {
    let (workers, batch) = (format!("\"{n}:{n}\""), PHOTOGRAPHS.to_string());
    let keys = [
        ("data.shards", "\"jpegs\""),
        ("elastic.workers", workers.as_str()),
        ("train.batch", batch.as_str()),
        ("train.slot_batch", "6"),
        ("optim.warmup", "\"1step\""),
    ];
    let mut cluster = Cluster::start(fixture);
    let run = cluster.submit(&fixture.spec(name, EPOCHS, &keys));
    cluster.add("a", n);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    seen
}

#[test]
fn damaged_images_are_replaced_alike_and_named_once_an_epoch() {
    let fixture = fixture();
    let bad = pack_damaged(&fixture);
    let (one, two) = (trained(&fixture, "one", 1), trained(&fixture, "two", 2));
    assert!(one.run.final_digest.is_some());
    assert_eq!(one.run.final_digest, two.run.final_digest);
    for seen in [one, two] {
        for epoch in 0..EPOCHS {
            for SamplePlace { sample, shard, offset, member } in &bad {
                let shard = shard.file_name().unwrap().to_str().unwrap();
                let member = member.as_ref().unwrap();
                let of_it = |e: &&lacuna_api::v1::RunEvent| {
                    e.kind == "bad_sample"
                        && e.text.starts_with(&format!("epoch {epoch}, step {epoch}: "))
                        && e.text.contains(&format!(": sample {sample} (`{member}` at "))
                };
                let told: Vec<_> = seen.events.iter().filter(of_it).collect();
                let [event] = told[..] else { panic!("{told:?}\n{}", seen.text()) };
                let place = [format!(" at byte {offset} of shard `"), format!("{shard}`) repl")];
                assert!(place.iter().all(|part| event.text.contains(part)), "{}", event.text);
                assert!(event.warning);
            }
        }
        assert_eq!(seen.count("bad_sample") as u64, EPOCHS * bad.len() as u64, "{}", seen.text());
        let all = seen.text();
        assert!(all.contains("the Jpeg data is cut off"), "{all}");
    }
}

#[test]
fn too_many_damaged_images_fail_the_run_and_say_how_many_and_where() {
    let fixture = fixture();
    let dataset = Dataset::open(&fixture.path("data")).unwrap();
    let n = 12;
    assert!(n < BAD_IN_ROW_MAX, "no slot fails by itself");
    (0..n).for_each(|id| overwrite(&dataset, SampleId(id.into()), |_| 0));
    index_again(&fixture, "data", 256);
    let spec = fixture.spec("broken", 200, &[]);
    let (code, out, err) = said(&fixture.run(&["train", spec.to_str().unwrap(), "--workers", "2"]));
    assert_eq!(code, 74, "{out}{err}");
    let shard = dataset.place(SampleId(0)).shard;
    let shard = shard.file_name().unwrap().to_str().unwrap();
    let parts = [
        " bad samples in epoch 0, ",
        " % of its 256 samples, and at most 9 are allowed (`data.bad_samples_max`); the last is ",
        shard,
    ];
    assert!(parts.iter().all(|part| err.contains(part)), "{out}{err}");
    let allowed = fixture.spec("allowed", 20, &[("data.bad_samples_max", "0.05")]);
    let (code, out, err) =
        said(&fixture.run(&["train", allowed.to_str().unwrap(), "--workers", "2"]));
    assert_eq!(code, 0, "{out}{err}");
}

/// What is trained on must not depend on whose copy of a shard is sound: such a machine is unfit.
#[test]
fn rotten_bytes_of_a_file_are_replaced_by_nothing_and_named() {
    let fixture = fixture();
    let dataset = Dataset::open(&fixture.path("data")).unwrap();
    overwrite(&dataset, SampleId(77), |_| 0);
    let spec = fixture.spec("rotten", 200, &[]);
    let (code, out, err) = said(&fixture.run(&["train", spec.to_str().unwrap(), "--workers", "1"]));
    assert_eq!(code, 74, "{out}{err}");
    assert!(err.contains("sample 77 (") && err.contains("is corrupt: crc"), "{out}{err}");
}
