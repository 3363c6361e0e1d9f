use std::collections::BTreeMap;

use expect_test::expect;
use lacuna_recipe::keymap::{Part, ours};
use safetensors::SafeTensors;

use super::weights::bf16;
use super::*;
use crate::chain;
use crate::testing::{Sample, manifest, micro, run_dir, sample, tree};

fn options(layout: ExportLayout) -> ExportOptions {
    ExportOptions {
        layout,
        dtype: ExportDtype::F32,
        max_shard_bytes: MAX_SHARD_BYTES,
        image_mean: vec![0.485, 0.456, 0.406],
        image_std: vec![0.229, 0.224, 0.225],
        classes: Vec::new(),
    }
}

fn export_to(state: &Sample, options: &ExportOptions, out: &Path) -> Exported {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    state.save(&dir, 3);
    let manifest = manifest(&dir, state.counters.step);
    export(&dir, &manifest, state.config.as_ref().unwrap(), options, out).unwrap()
}

/// Values and shapes of a file, and its metadata.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn read_file(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let about = header.metadata().as_ref().unwrap();
    assert_eq!(about["format"], "pt", "transformers refuses files without it");
    assert!(about["lacuna.manifest"].starts_with("blake3:"), "{about:?}");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |(name, tensor): (String, safetensors::tensor::TensorView<'_>)| {
        (name, (tensor.shape().to_vec(), floats(tensor.data())))
    };
    file.tensors().into_iter().map(read).collect()
}

fn want(state: &Sample, name: &str, part: Part) -> (Vec<usize>, Vec<f32>) {
    let config = state.config.as_ref().unwrap();
    let table = |width: u32| {
        let shape = vec![1, config.n_patches() + 1, width as usize];
        (shape, sincos_2d(width as usize, config.grid()))
    };
    match name {
        "pos_embed" => return table(config.width),
        "decoder_pos_embed" => return table(config.decoder_width),
        _ => {}
    }
    let block = state.layout.find(name).unwrap();
    let mut shape = state.layout.params()[block].shape.clone();
    let values = &state.sections[0][state.layout.range(block)];
    let row = values.len() / shape[0];
    let rows = part.rows(shape[0]);
    shape[0] = rows.len();
    (shape, values[rows.start * row..rows.end * row].to_vec())
}

#[test]
fn mae_has_everything() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("deep/model.safetensors");
    let state = micro(4);
    let exported = export_to(&state, &options(ExportLayout::Mae), &path);
    let found = read_file(&path);
    assert_eq!(found.len(), state.layout.n_blocks() + 2);
    assert_eq!(exported.n_tensors, found.len());
    let digest = blake3::hash(&std::fs::read(&path).unwrap());
    assert_eq!(exported.weights, [(path, format!("blake3:{}", digest.to_hex()))]);
    for (name, tensor) in found {
        assert_eq!(tensor, want(&state, &name, Part::Whole), "{name}");
    }
}

#[test]
fn timm_has_the_encoder_alone() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("vit.safetensors");
    let state = micro(4);
    export_to(&state, &options(ExportLayout::Timm), &path);
    let found = read_file(&path);
    assert_eq!(found.len(), 4 + 2 * 12 + 2);
    assert!(found.keys().all(|name| !name.starts_with("decoder") && name != "mask_token"));
    for (name, tensor) in found {
        assert_eq!(tensor, want(&state, &name, Part::Whole), "{name}");
    }
}

#[test]
fn classes_keep_their_names() {
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("vit.safetensors");
    let about = |classes: Vec<String>| {
        export_to(&micro(4), &ExportOptions { classes, ..options(ExportLayout::Timm) }, &path);
        let bytes = std::fs::read(&path).unwrap();
        SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone().unwrap()
    };
    let named = about(vec!["a \"b\"".to_string(), "ü".to_string()]);
    assert_eq!(named["lacuna.classes"], r#"["a \"b\"","ü"]"#);
    assert!(!about(Vec::new()).contains_key("lacuna.classes"));
}

#[test]
fn hugging_face_gets_split_tensors_and_its_configuration() {
    let out = tempfile::tempdir().unwrap();
    let state = micro(4);
    export_to(&state, &options(ExportLayout::Hf), out.path());
    let found = read_file(&out.path().join("model.safetensors"));
    assert_eq!(found.len(), state.layout.n_blocks() + 2 + 3 * 2 * 2, "two more per fused tensor");
    for (name, tensor) in found {
        let source = ours(&name).unwrap();
        assert_eq!(tensor, want(&state, &source.name, source.part), "{name}");
    }
    let text = |name: &str| std::fs::read_to_string(out.path().join(name)).unwrap();
    expect![[r#"
        {
          "architectures": [
            "ViTMAEForPreTraining"
          ],
          "attention_probs_dropout_prob": 0.0,
          "decoder_hidden_size": 8,
          "decoder_intermediate_size": 32,
          "decoder_num_attention_heads": 2,
          "decoder_num_hidden_layers": 1,
          "hidden_act": "gelu",
          "hidden_dropout_prob": 0.0,
          "hidden_size": 8,
          "image_size": 8,
          "initializer_range": 0.02,
          "intermediate_size": 32,
          "layer_norm_eps": 1e-6,
          "mask_ratio": 0.75,
          "model_type": "vit_mae",
          "norm_pix_loss": true,
          "num_attention_heads": 2,
          "num_channels": 3,
          "num_hidden_layers": 2,
          "patch_size": 2,
          "qkv_bias": true,
          "torch_dtype": "float32"
        }
    "#]]
    .assert_eq(&text("config.json"));
    expect![[r#"
        {
          "do_normalize": true,
          "do_rescale": true,
          "do_resize": true,
          "image_mean": [
            0.485,
            0.456,
            0.406
          ],
          "image_processor_type": "ViTImageProcessor",
          "image_std": [
            0.229,
            0.224,
            0.225
          ],
          "resample": 3,
          "rescale_factor": 0.00392156862745098,
          "size": {
            "height": 8,
            "width": 8
          }
        }
    "#]]
    .assert_eq(&text("preprocessor_config.json"));
    assert_eq!(tree(out.path()).len(), 3);
}

#[test]
fn the_encoder_of_hugging_face_stands_alone() {
    let out = tempfile::tempdir().unwrap();
    let state = micro(4);
    export_to(&state, &options(ExportLayout::HfEncoder), out.path());
    let found = read_file(&out.path().join("model.safetensors"));
    assert_eq!(found.len(), 4 + 2 * 12 + 2 + 2 * 2 * 2, "two more per fused tensor");
    for (name, tensor) in found {
        assert!(!name.starts_with("vit.") && !name.starts_with("decoder."), "{name}");
        let source = ours(&name).unwrap();
        assert_eq!(tensor, want(&state, &source.name, source.part), "{name}");
    }
    let config = std::fs::read_to_string(out.path().join("config.json")).unwrap();
    assert!(config.contains("\"ViTMAEModel\"") && !config.contains("ForPreTraining"), "{config}");
}

#[test]
fn large_models_are_cut_into_files_with_an_index() {
    let out = tempfile::tempdir().unwrap();
    let state = micro(4);
    let names = || tree(out.path()).into_iter().map(|(name, _)| name).collect::<Vec<String>>();
    let small = ExportOptions { max_shard_bytes: 4096, ..options(ExportLayout::Hf) };
    let exported = export_to(&state, &small, out.path());
    let n = exported.weights.len();
    assert!(n > 2, "{n} files");
    let text = std::fs::read(out.path().join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&text).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    let (mut bytes, mut n_tensors) = (0, 0);
    for (i, (path, digest)) in (1..).zip(&exported.weights) {
        let file = format!("model-{i:05}-of-{n:05}.safetensors");
        assert_eq!(*path, out.path().join(&file));
        assert_eq!(index["metadata"]["lacuna.digests"][&file], *digest);
        let found = read_file(path);
        let size = 4 * found.values().map(|(_, values)| values.len()).sum::<usize>();
        assert!(size <= 4096 || found.len() == 1, "{file}: {size} bytes");
        (bytes, n_tensors) = (bytes + size, n_tensors + found.len());
        for (name, tensor) in found {
            assert_eq!(map[&name], file);
            let source = ours(&name).unwrap();
            assert_eq!(tensor, want(&state, &source.name, source.part), "{name}");
        }
    }
    assert_eq!((map.len(), exported.n_tensors), (n_tensors, n_tensors));
    assert_eq!(index["metadata"]["total_size"], bytes);
    assert_eq!(exported.files.len(), n + 3);
    assert_eq!(names().len(), n + 3);

    // A later export leaves nothing of an earlier one.
    export_to(&state, &options(ExportLayout::Hf), out.path());
    assert_eq!(names(), ["config.json", "model.safetensors", "preprocessor_config.json"]);
    let halves = ExportOptions { dtype: ExportDtype::Bf16, ..small };
    let n_halves = export_to(&state, &halves, out.path()).weights.len();
    assert!(n_halves < n && !out.path().join("model.safetensors").exists());
    assert_eq!(names().len(), n_halves + 3);
}

#[test]
fn an_export_that_fails_leaves_the_earlier_one() {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("out");
    let state = micro(4);
    let dir = run_dir(root.path());
    state.save(&dir, 1);
    let manifest = manifest(&dir, 4);
    let small = ExportOptions { max_shard_bytes: 4096, ..options(ExportLayout::Hf) };
    let config = state.config.as_ref().unwrap();
    export(&dir, &manifest, config, &small, &out).unwrap();
    let before = tree(&out);
    let part = crate::testing::part_path(&dir, 4, 0, 1);
    let mut bytes = std::fs::read(&part).unwrap();
    let end = bytes.len() - 200;
    bytes[end] ^= 1; // inside the last parameter, before the exponents
    std::fs::write(&part, bytes).unwrap();
    for layout in [ExportLayout::Hf, ExportLayout::HfEncoder] {
        let damaged = export(&dir, &manifest, config, &options(layout), &out).unwrap_err();
        assert!(chain(&damaged).contains("is damaged"), "{}", chain(&damaged));
        assert!(tree(&out) == before, "{layout:?}");
    }
}

#[test]
fn files_end_where_the_next_tensor_would_be_too_much() {
    let item = |elements: u64| Item {
        name: String::new(),
        ours: String::new(),
        shape: vec![elements],
        elements: 0..elements,
        source: Source::Checkpoint,
    };
    let cut = |sizes: &[u64], max: u64| -> Vec<usize> {
        let items: Vec<Item> = sizes.iter().map(|n| item(*n)).collect();
        hf::shards(&items, ExportDtype::F32, max).iter().map(|(_, range)| range.len()).collect()
    };
    assert_eq!(cut(&[1, 1, 1], 12), [3]);
    assert_eq!(cut(&[1, 1, 1], 8), [2, 1]);
    assert_eq!(cut(&[9, 1, 9, 1, 1], 8), [1, 1, 1, 2], "a large tensor is alone");
    assert_eq!(cut(&[5], 1), [1]);
}

#[test]
fn half_precision_is_rounded_to_nearest() {
    for (x, want) in [
        (1.0, 0x3f80),
        (1.0 + 1.0 / 256.0, 0x3f80),
        (1.0 + 3.0 / 256.0, 0x3f82),
        (-0.0, 0x8000),
        (f32::INFINITY, 0x7f80),
        (f32::MAX, 0x7f80),
        (f32::from_bits(0x7f80_0001), 0x7fc0),
        (f32::from_bits(0xffff_ffff), 0xffff),
    ] {
        assert_eq!(bf16(x), want, "{x}");
    }
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("m.safetensors");
    let halves = ExportOptions { dtype: ExportDtype::Bf16, ..options(ExportLayout::Mae) };
    export_to(&micro(4), &halves, &path);
    let bytes = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert!(file.tensors().iter().all(|(_, t)| t.dtype() == safetensors::Dtype::BF16));
}

#[test]
fn what_cannot_be_exported_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    let mut config = ModelConfig::preset("micro").unwrap();
    config.img_size = [8, 12];
    let state = Sample { config: Some(config.clone()), ..sample(Layout::new(config.params()), 3) };
    state.save(&dir, 1);
    let manifest = manifest(&dir, 3);
    let out = root.path().join("out");
    let refused = |config: &ModelConfig, layout| {
        chain(&export(&dir, &manifest, config, &options(layout), &out).unwrap_err())
    };
    for layout in [ExportLayout::Hf, ExportLayout::HfEncoder] {
        let text = refused(&config, layout);
        assert!(text.starts_with("images of 8x12 cannot be exported for Hugging Face: "), "{text}");
    }
    let text = refused(&ModelConfig::preset("demo").unwrap(), ExportLayout::Mae);
    assert!(text.starts_with("checkpoint step 3 is not of this model:\n"), "{text}");
    assert!(!out.exists());
    assert!(export(&dir, &manifest, &config, &options(ExportLayout::Timm), &out).is_ok());
}
