//! Models that are told from their files.

use super::*;
use crate::import::model::{DescribeError, Described, Given, describe, read_model};

/// What a person must say of a file under the reference's names.
fn given() -> Given {
    Given { heads: Some(2), decoder_heads: Some(2), ..Given::default() }
}

fn described(path: &Path, given: &Given) -> Result<Described, DescribeError> {
    describe(&Weights::open(path).unwrap(), given)
}

fn refused(path: &Path, given: &Given) -> String {
    chain(&described(path, given).unwrap_err())
}

#[test]
fn sizes_are_those_of_the_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let state = state();
    type Rename = fn(&str) -> Vec<Mapped>;
    let forms: [(Rename, bool); 4] = [(whole, true), (v4, true), (v5, true), (encoder, false)];
    for (rename, has_decoder) in forms {
        write(&path, &renamed(&state, rename));
        let found = described(&path, &given()).unwrap();
        assert_eq!((found.has_decoder, found.normalization), (has_decoder, None));
        let small = ModelConfig { decoder_width: 4, decoder_heads: 1, ..model() };
        assert_eq!(found.config, if has_decoder { model() } else { small });
        let read = read_model(&Weights::open(&path).unwrap(), &found.config).unwrap();
        // Sine-cosine tables are computed, not taken.
        assert_eq!((read.encoder_table, read.decoder_table), (None, None));
        let layout = Layout::new(found.config.params());
        let norm = |layout: &Layout| layout.range(layout.find("norm.weight").unwrap());
        assert_eq!(
            bits(&read.params[norm(&layout)]),
            bits(&state.sections[0][norm(&state.layout)])
        );
        if has_decoder {
            assert_eq!(bits(&read.params), bits(&state.sections[0]));
        }
    }
}

#[test]
fn what_tensors_do_not_show_is_asked_for_or_guessed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    write(&path, &renamed(&state(), whole));
    // The preset `micro` has these sizes.
    let found = described(&path, &Given::default()).unwrap();
    assert_eq!(
        found.notices,
        [
            "how many attention heads the encoder has is not in the file: 2, as in preset `micro`",
            "how many attention heads the decoder has is not in the file: 2, as in preset `micro`",
            "whether the decoder predicts normalised patches (norm_pix_loss) is not in the file: \
             taken as true",
        ]
    );
    let alone = Given { heads: Some(2), encoder_alone: true, ..Given::default() };
    let found = described(&path, &alone).unwrap();
    assert_eq!((found.notices.len(), found.config.decoder_heads), (0, 1));
    let told = Given { norm_pix_loss: Some(false), ..given() };
    let found = described(&path, &told).unwrap();
    assert_eq!((found.notices.len(), found.config.norm_pix_loss), (0, false));
    assert_eq!(
        refused(&path, &Given { heads: Some(3), ..given() }),
        "the file's tensors make no model:\n  `width` = 8 must be a multiple of 3 (`heads`)"
    );
    // One block only: no preset is like that.
    let mut tensors = renamed(&state(), encoder);
    tensors.retain(|tensor| !tensor.name.starts_with("blocks.1."));
    write(&path, &tensors);
    assert_eq!(
        refused(&path, &Given::default()),
        "how many attention heads the encoder has is not in the file, and no preset is 8 wide and \
         1 deep"
    );
    assert_eq!(described(&path, &given()).unwrap().config.depth, 1);
    tensors.retain(|tensor| tensor.name != "norm.bias");
    write(&path, &tensors);
    assert_eq!(
        refused(&path, &given()),
        "the file's tensors make no model:\n  `norm.bias` is missing"
    );
}

#[test]
fn a_table_of_its_own_is_kept_and_tells_the_image_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let write_with = |rows: u64, value: f32| {
        let mut tensors = renamed(&state(), encoder);
        for tensor in tensors.iter_mut().filter(|tensor| tensor.name == "pos_embed") {
            *tensor = Wire::f32("pos_embed", &[1, rows, 8], &vec![value; rows as usize * 8]);
        }
        write(&path, &tensors);
    };
    write_with(26, 0.5);
    let config = described(&path, &given()).unwrap().config;
    assert_eq!(config.img_size, [10, 10]);
    let read = read_model(&Weights::open(&path).unwrap(), &config).unwrap();
    assert_eq!(read.encoder_table, Some(vec![0.5; 26 * 8]));
    write_with(13, 0.5);
    let error = refused(&path, &given());
    assert!(error.ends_with("table is for 12 patches, which make no square"), "{error}");
    let oblong = Given { img_size: Some([6, 8]), ..given() };
    assert_eq!(described(&path, &oblong).unwrap().config.img_size, [6, 8]);
    let other = Given { img_size: Some([8, 8]), ..given() };
    assert!(refused(&path, &other).contains("make no square"));
    write_with(26, f32::NAN);
    let error = read_model(&Weights::open(&path).unwrap(), &config).unwrap_err();
    assert!(chain(&error).ends_with("not finite: `pos_embed`"), "{error}");
}

#[test]
fn documents_of_transformers_say_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("model.safetensors"), &renamed(&state(), v4));
    let save = |name: &str, document: Value| {
        std::fs::write(folder.path().join(name), document.to_string()).unwrap();
    };
    save(
        "config.json",
        json!({
            "model_type": "vit_mae", "num_attention_heads": 4, "decoder_num_attention_heads": 1,
            "image_size": 8, "mask_ratio": 0.5, "norm_pix_loss": false, "layer_norm_eps": 1e-6,
        }),
    );
    save(
        "preprocessor_config.json",
        json!({
            "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6],
        }),
    );
    let found = described(folder.path(), &Given::default()).unwrap();
    let config = &found.config;
    assert_eq!((config.heads, config.decoder_heads, config.mask_ratio), (4, 1, 0.5));
    assert!(!config.norm_pix_loss);
    assert_eq!(found.normalization, Some((vec![0.1, 0.2, 0.3], vec![0.4, 0.5, 0.6])));
    assert_eq!(found.notices, Vec::<String>::new());
    assert!(
        refused(folder.path(), &Given { heads: Some(2), ..Given::default() })
            .ends_with("config.json has num_attention_heads 4, this model 2")
    );
    save("config.json", json!({ "model_type": "vit_mae", "image_size": [8, 12] }));
    let error = read_model(
        &Weights::open(folder.path()).unwrap(),
        &described(folder.path(), &given()).unwrap().config,
    );
    let error = chain(&error.unwrap_err());
    assert!(
        error.contains("17 rows, not one for the class token and one for each of 4 x 6"),
        "{error}"
    );
}

#[test]
fn an_export_says_what_it_is_of() {
    let root = tempfile::tempdir().unwrap();
    let dir = run_dir(root.path());
    state().save(&dir, 1);
    let manifest = manifest(&dir, 4);
    let path = root.path().join("export.safetensors");
    let options = ExportOptions {
        layout: ExportLayout::Timm,
        dtype: ExportDtype::F32,
        max_shard_bytes: MAX_SHARD_BYTES,
        image_mean: vec![0.1, 0.2, 0.3],
        image_std: vec![0.4, 0.5, 0.6],
        classes: Vec::new(),
    };
    export(&dir, &manifest, &model(), &options, &path).unwrap();
    let found = described(&path, &Given::default()).unwrap();
    assert_eq!((found.config.heads, found.has_decoder), (2, false));
    assert_eq!(found.normalization, Some((vec![0.1, 0.2, 0.3], vec![0.4, 0.5, 0.6])));
    assert_eq!(found.notices, Vec::<String>::new());
}
