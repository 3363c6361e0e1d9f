//! From files to the first checkpoint of a run.

use super::*;
use crate::load::LoadedState;

const HINT: &str = "weights are imported into new runs only; give the spec another name, or remove \
                    the run's folder";

/// The run that is exported.
fn saved(root: &Path) -> RunDir {
    RunDir::new(root, "r-7f3a".parse().unwrap())
}

/// Exports a run's checkpoint, whose parameters are those of `state`.
fn exported(root: &Path, state: &Sample, layout: ExportLayout, max_shard_bytes: u64) {
    let dir = saved(root);
    if !dir.manifest(Step(4)).exists() {
        state.save(&run_dir(root), 2);
    }
    let options = ExportOptions {
        layout,
        dtype: ExportDtype::F32,
        max_shard_bytes,
        image_mean: vec![0.5; 3],
        image_std: vec![0.5; 3],
        classes: Vec::new(),
    };
    let is_folder = matches!(layout, ExportLayout::Hf | ExportLayout::HfEncoder);
    let out = if is_folder { root.join("out") } else { root.join("out/x.safetensors") };
    let _ = std::fs::remove_dir_all(root.join("out"));
    export(&dir, &manifest(&dir, 4), &model(), &options, &out).unwrap();
}

fn fresh(root: &Path, run: &str) -> RunDir {
    RunDir::new(root.join("runs"), run.parse().unwrap())
}

fn begin(dir: &RunDir, config: &ModelConfig, params: &[f32]) -> Result<LoadedState, StartError> {
    let context = micro(0).context(attempt(1), 1);
    let start = Start {
        config,
        params,
        batch: 16,
        facts: context.facts,
        spec: context.spec,
        created: context.created,
    };
    let committed = commit_start(dir, &start)?;
    let layout = Layout::new(config.params());
    let loaded = load_newest(dir, &Expected::tensors(&layout)).unwrap().unwrap().state;
    assert_eq!(committed.manifest, loaded.manifest.seal);
    assert_eq!(committed.state_digest, loaded.manifest.state_digest.0);
    Ok(loaded)
}

#[test]
fn an_export_comes_back_bit_by_bit() {
    let root = tempfile::tempdir().unwrap();
    let state = state();
    for (i, (layout, max_bytes, form)) in [
        (ExportLayout::Mae, MAX_SHARD_BYTES, Form::Mae),
        (ExportLayout::Hf, MAX_SHARD_BYTES, Form::Hf4),
        (ExportLayout::Hf, 4096, Form::Hf4),
    ]
    .into_iter()
    .enumerate()
    {
        exported(root.path(), &state, layout, max_bytes);
        let found = read_all(&root.path().join("out")).unwrap();
        assert_eq!(found.form, form);
        assert_eq!(found.notices[0], "the file was exported from run r-7f3a at step 4");
        let dir = fresh(root.path(), &format!("r{i}"));
        let loaded = begin(&dir, &model(), &found.params).unwrap();
        assert_eq!(bits(&loaded.sections[0]), bits(&state.sections[0]));
        for moments in &loaded.sections[1..] {
            assert_eq!(bits(moments), vec![0; moments.len()]);
        }
        let n = state.layout.n_blocks();
        assert_eq!(loaded.counters, lacuna_recipe::state::Counters::fresh(n, 16));
        let before = manifest(&saved(root.path()), 4);
        for (name, tensor) in &loaded.manifest.tensors {
            if name.starts_with("param/") || name.starts_with("buffer/") {
                assert_eq!(tensor.crc64, before.tensors[name].crc64, "{name}");
            }
        }
        assert!(loaded.manifest.state.finite && loaded.manifest.parent.is_none());
        assert_eq!((loaded.manifest.step, loaded.manifest.coord_epoch), (0, 1));
        let verified = crate::read::verify(&dir, &loaded.manifest);
        assert_eq!(verified.problems, Vec::<String>::new());
    }
    for (layout, form) in
        [(ExportLayout::Timm, Form::Timm), (ExportLayout::HfEncoder, Form::HfEncoder)]
    {
        exported(root.path(), &state, layout, MAX_SHARD_BYTES);
        let found = read_all(&root.path().join("out")).unwrap();
        assert_eq!(found.form, form);
        assert_eq!(bits(&found.params), bits(&with_drawn_decoder(&state)));
    }
}

/// Weights as a run would draw them give the state that it would have begun with.
#[test]
fn drawn_weights_are_the_start_of_a_fresh_run() {
    let root = tempfile::tempdir().unwrap();
    let layout = Layout::new(model().params());
    let mut state = sample(Arc::clone(&layout), 0);
    state.config = Some(model());
    for (block, param) in layout.params().iter().enumerate() {
        init::fill(param, SEED, &mut state.sections[0][layout.range(block)]);
    }
    let path = root.path().join("drawn.safetensors");
    write(&path, &renamed(&state, encoder));
    let found = read_all(&path).unwrap();
    assert_eq!(bits(&found.params), bits(&state.sections[0]));
}

#[test]
fn only_a_new_run_is_begun() {
    let root = tempfile::tempdir().unwrap();
    let params = state().sections[0].clone();
    let dir = fresh(root.path(), "mine");
    begin(&dir, &model(), &params).unwrap();
    let before = tree(&dir.path());
    let refused = begin(&dir, &model(), &params).unwrap_err();
    assert_eq!(chain(&refused), format!("run `mine` has a checkpoint at step 0: {HINT}"));
    // A checkpoint that cannot be used is one too.
    std::fs::write(dir.manifest(Step(0)), "{}").unwrap();
    assert!(matches!(begin(&dir, &model(), &params), Err(StartError::Begun { .. })));
    std::fs::write(dir.manifest(Step(0)), find(&before, "manifest.json")).unwrap();
    assert!(tree(&dir.path()) == before, "nothing was changed");

    let dir = fresh(root.path(), "taken");
    claim(&dir, CoordEpoch(3)).unwrap();
    let refused = begin(&dir, &model(), &params).unwrap_err();
    assert_eq!(chain(&refused), format!("run `taken` was begun by coordinator epoch 3: {HINT}"));
    assert!(!dir.checkpoints().exists());
}

fn find(tree: &[(String, Vec<u8>)], name: &str) -> Vec<u8> {
    tree.iter().find(|(path, _)| path.ends_with(name)).unwrap().1.clone()
}

#[test]
fn an_import_that_died_can_be_done_again() {
    let root = tempfile::tempdir().unwrap();
    let params = state().sections[0].clone();
    let dir = fresh(root.path(), "mine");
    let left = dir.step(Step(0)).join("attempt-00000001.0001");
    std::fs::create_dir_all(&left).unwrap();
    std::fs::write(left.join("part-00000-of-00001.safetensors.partial"), "half").unwrap();
    let loaded = begin(&dir, &model(), &params).unwrap();
    assert_eq!(loaded.manifest.attempt.to_string(), "00000002.0001", "names are not used again");
}
