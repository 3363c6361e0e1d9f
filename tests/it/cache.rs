//! `data.cache`: decoded planes on a disk change no bit of a run.

use lacuna_tests::{Cluster, Fixture, said};

use crate::{fixture, photographs};

const STEPS: u64 = 20;

/// Packs copies of a few JPEG photographs into the fixture's folder.
fn pack_photographs(fixture: &Fixture) {
    photographs(fixture);
    let (code, _, err) = said(&fixture.run(&["data", "pack", "photographs", "jpegs"]));
    assert_eq!(code, 0, "{err}");
}

/// Trains on the photographs and returns the digest of the end.
fn trained(fixture: &Fixture, name: &str, n: usize, extra: &[(&str, &str)]) -> u64 {
    let workers = format!("\"{n}:{n}\"");
    let mut keys = vec![("data.shards", "\"jpegs\""), ("elastic.workers", workers.as_str())];
    keys.extend(extra);
    let mut cluster = Cluster::start(fixture);
    let run = cluster.submit(&fixture.spec(name, STEPS, &keys));
    cluster.add("a", n);
    let seen = cluster.wait_end(&run);
    assert_eq!(seen.run.state, "finished", "{}", seen.text());
    seen.run.final_digest.expect("a finished run has a digest")
}

#[test]
fn planes_on_a_disk_change_no_bit() {
    let fixture = fixture();
    pack_photographs(&fixture);
    let cache = ("data.cache", "{ dir = \"planes\", size = \"1GB\", mode = \"planes\" }");
    let want = trained(&fixture, "without", 1, &[]);
    assert_eq!(trained(&fixture, "filling", 1, &[cache]), want);
    assert_eq!(trained(&fixture, "reading", 2, &[cache]), want);
    if lacuna_data::DECODER_ID.starts_with("libjpeg-turbo") {
        assert!(fixture.path("planes").is_dir(), "the cache was used");
    } else {
        println!("whether the cache was used: skipped, this build has no libjpeg-turbo");
    }
}
