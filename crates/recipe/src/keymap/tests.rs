use std::collections::BTreeSet;

use super::*;
use crate::model::ModelConfig;

fn golden() -> Vec<serde_json::Value> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/keymap_vit_base.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn names(targets: &[Mapped]) -> Vec<&str> {
    targets.iter().map(|t| t.name.as_str()).collect()
}

/// T20.
#[test]
fn map_of_the_base_model() {
    let golden = golden();
    assert_eq!(golden.len(), 254);
    let (mut v4, mut v5) = (BTreeSet::new(), BTreeSet::new());
    let mut n_timm = 0;
    for row in &golden {
        let name = row["fb"].as_str().unwrap();
        assert_eq!(timm(name).as_deref(), row["timm"].as_str(), "{name}");
        n_timm += usize::from(row["timm"].is_string());
        for (key, version, seen) in [("hf4", HfNames::V4, &mut v4), ("hf5", HfNames::V5, &mut v5)] {
            let targets = hf(name, version).unwrap();
            let want: Vec<&str> =
                row[key].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
            assert_eq!(names(&targets), want, "{name}");
            for target in targets {
                let back = Mapped { name: name.to_string(), part: target.part };
                assert_eq!(ours(&target.name), Some(back), "{}", target.name);
                assert!(seen.insert(target.name), "{name}: two sources of one tensor");
            }
        }
    }
    assert_eq!((v4.len(), v5.len(), n_timm), (334, 334, 150));
    let back: BTreeSet<String> = v4.iter().map(|name| ours(name).unwrap().name).collect();
    assert_eq!(back.len(), 254);
}

#[test]
fn every_parameter_of_every_preset_has_a_place() {
    for (preset, want) in [("base", 334), ("large", 526), ("huge", 654)] {
        let params = ModelConfig::preset(preset).unwrap().params();
        let n: usize = params.iter().map(|p| hf(&p.name, HfNames::V4).unwrap().len()).sum();
        assert_eq!(n + 2, want, "{preset}: with the two position tables");
    }
}

#[test]
fn resaved_decoder_names_are_understood() {
    let name = "decoder.decoder_encoder.layer.3.attention.attention.key.bias";
    let want = Mapped { name: "decoder_blocks.3.attn.qkv.bias".to_string(), part: Part::Key };
    assert_eq!(ours(name), Some(want));
}

#[test]
fn unknown_names_have_no_place() {
    for name in ["", "head.weight", "blocks.x.norm1.weight", "blocks.0.norm3.weight", "norm.gain"] {
        assert_eq!(hf(name, HfNames::V4), None, "{name}");
        assert_eq!(timm(name), None, "{name}");
        assert_eq!(ours(name), None, "{name}");
    }
}

#[test]
fn parts_are_thirds_in_order() {
    assert_eq!(Part::Whole.rows(7), 0..7);
    assert_eq!(Part::QKV.map(|part| part.rows(12)), [0..4, 4..8, 8..12]);
}
