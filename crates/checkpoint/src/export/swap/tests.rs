use std::collections::BTreeMap;

use super::*;
use crate::testing::tree;

/// Which export a name's file is of.
type Directory = BTreeMap<String, &'static str>;

fn documents() -> [String; 2] {
    ["config.json", "preprocessor_config.json"].map(str::to_string)
}

/// Names of an export with so many weights files, in the order in which they are put.
fn names(n_shards: usize) -> Vec<String> {
    let shard = |i: usize| format!("model-{i:05}-of-{n_shards:05}.safetensors");
    let mut out: Vec<String> = documents().to_vec();
    match n_shards {
        1 => out.push(SINGLE.to_string()),
        n => out.extend((1..=n).map(shard).chain([INDEX.to_string()])),
    }
    out
}

/// Tells what a loader takes: of which exports, or nothing where it fails.
fn loaded(directory: &Directory, shards: &BTreeMap<&str, usize>) -> Option<Vec<&'static str>> {
    let mut out: Vec<&'static str> = Vec::new();
    match (directory.get(SINGLE), directory.get(INDEX)) {
        (Some(version), _) => out.push(version),
        (None, Some(version)) => {
            out.push(version);
            for name in names(shards[version]).iter().filter(|name| is_shard(name)) {
                out.push(directory.get(name)?);
            }
        }
        (None, None) => return None,
    }
    for name in documents() {
        out.push(directory.get(&name)?);
    }
    Some(out)
}

fn apply(directory: &mut Directory, change: &Change) {
    match change {
        Change::Remove(name) => drop(directory.remove(name)),
        Change::Put(name) => drop(directory.insert(name.clone(), "new")),
        Change::Sync => {}
    }
}

/// Every directory that a crash may leave: changes before the last sync, and any of those after it.
fn after_crashes(before: &Directory, changes: &[Change]) -> Vec<Directory> {
    let mut out: Vec<Directory> = Vec::new();
    let mut durable = before.clone();
    let mut pending: Vec<&Change> = Vec::new();
    for change in changes {
        pending.push(change);
        for kept in 0..1u32 << pending.len() {
            let mut directory = durable.clone();
            let kept = pending.iter().enumerate().filter(|(i, _)| kept >> i & 1 == 1);
            kept.for_each(|(_, change)| apply(&mut directory, change));
            out.push(directory);
        }
        if !matches!(change, Change::Remove(_)) {
            pending.drain(..).for_each(|change| apply(&mut durable, change));
        }
    }
    out
}

#[test]
fn no_crash_leaves_a_mixture_that_loads() {
    let mut n_states = 0;
    for n_old in 0..4 {
        for n_new in 1..4 {
            let old = if n_old == 0 { Vec::new() } else { names(n_old) };
            let before: Directory = old.iter().map(|name| (name.clone(), "old")).collect();
            let shards = BTreeMap::from([("old", n_old), ("new", n_new)]);
            let existing: Vec<String> = before.keys().cloned().collect();
            let changes = changes(&existing, &names(n_new));
            for directory in after_crashes(&before, &changes) {
                n_states += 1;
                let Some(versions) = loaded(&directory, &shards) else { continue };
                assert!(
                    versions.windows(2).all(|pair| pair[0] == pair[1]),
                    "{n_old} to {n_new}: {directory:?}"
                );
            }
            let mut after = before;
            changes.iter().for_each(|change| apply(&mut after, change));
            let mut want = names(n_new);
            want.sort();
            assert_eq!(after.keys().cloned().collect::<Vec<_>>(), want, "nothing stale stays");
        }
    }
    assert!(n_states > 200, "{n_states}");
}

#[test]
fn another_order_would_be_found_out() {
    let before: Directory = names(2).into_iter().map(|name| (name, "old")).collect();
    let shards = BTreeMap::from([("old", 2), ("new", 2)]);
    let careless: Vec<Change> = names(2).into_iter().map(Change::Put).collect();
    let mixed = |directory: &Directory| {
        let versions = loaded(directory, &shards);
        versions.is_some_and(|v| v.contains(&"old") && v.contains(&"new"))
    };
    assert!(after_crashes(&before, &careless).iter().any(mixed));
}

#[test]
fn other_files_stay_and_leftovers_go() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str| std::fs::write(folder.path().join(name), "old").unwrap();
    let stay = ["README.md", "model-00001-of-x.safetensors", "notes.partial", "pytorch_model.bin"];
    stay.iter().for_each(|name| put(name));
    put("model-00002-of-00009.safetensors");
    put("model-00001-of-00002.safetensors.partial");
    put(INDEX);
    let mut staged = Staged::new(folder.path()).unwrap();
    staged.add_text("config.json", "new").unwrap();
    staged.add_text(SINGLE, "new").unwrap();
    assert_eq!(std::fs::read(folder.path().join(INDEX)).unwrap(), b"old", "until all is whole");
    staged.publish().unwrap();
    let found: Vec<String> = tree(folder.path()).into_iter().map(|(name, _)| name).collect();
    let mut want: Vec<String> = stay.iter().map(|name| name.to_string()).collect();
    want.extend(["config.json".to_string(), SINGLE.to_string()]);
    want.sort();
    assert_eq!(found, want);
}
