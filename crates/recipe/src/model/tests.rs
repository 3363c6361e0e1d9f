use super::*;

/// T12 and the published sizes: tensors, parameters, decay groups of ViT-B, L and H.
#[test]
fn sizes_of_the_published_models() {
    let rows = [
        ("base", 252, 111_655_680, 85, 111_478_016),
        ("large", 396, 329_239_296, 133, 0),
        ("huge", 492, 656_613_964, 165, 0),
    ];
    for (name, tensors, params, decayed, decayed_params) in rows {
        let config = ModelConfig::preset(name).unwrap();
        assert_eq!(config.problems(), vec![]);
        let list = config.params();
        assert_eq!(list.len(), tensors, "{name}");
        assert_eq!(config.n_params(), params, "{name}");
        let decay: Vec<&ParamSpec> = list.iter().filter(|p| p.decays(true)).collect();
        assert_eq!(decay.len(), decayed, "{name}");
        if decayed_params > 0 {
            assert_eq!(decay.iter().map(|p| p.numel()).sum::<usize>(), decayed_params);
        }
        for token in ["cls_token", "mask_token", "patch_embed.proj.weight"] {
            assert!(decay.iter().any(|p| p.name == token), "{token} is decayed");
        }
        assert_eq!(list.iter().filter(|p| p.decays(false)).count(), decayed - 2);
    }
}

/// A classifier learns its position table, which neither recipe decays.
#[test]
fn position_tables_are_not_decayed() {
    let list = ModelConfig::preset("micro").unwrap().params();
    let token = list.iter().find(|param| param.name == "cls_token").unwrap().clone();
    let table = ParamSpec { name: "pos_embed".to_string(), ..token };
    assert!(!table.decays(true) && !table.decays(false));
}

#[test]
fn flops_agree_with_the_published_table() {
    for (name, gflop) in [("base", 58.46), ("large", 124.23), ("huge", 290.99), ("small", 15.39)] {
        let got = ModelConfig::preset(name).unwrap().train_flops() / 1e9;
        assert!((got - gflop).abs() / gflop < 2e-3, "{name}: {got} against {gflop}");
    }
}

#[test]
fn params_are_sorted_and_unique() {
    for (name, _) in PRESETS {
        let list = ModelConfig::preset(name).unwrap().params();
        assert!(list.windows(2).all(|pair| pair[0].name < pair[1].name));
    }
}

#[test]
fn every_problem_is_reported() {
    let mut config = ModelConfig::preset("tiny").unwrap();
    config.img_size = [225, 224];
    config.heads = 5;
    config.mask_ratio = 0.0;
    let text: Vec<String> = config.problems().iter().map(ToString::to_string).collect();
    assert_eq!(
        text,
        [
            "`img_size[0]` = 225 must be a multiple of 16 (`patch_size`)",
            "`width` = 192 must be a multiple of 5 (`heads`)",
            "`mask_ratio` = 0 keeps 196 of 196 patches; at least one must be kept and one removed",
        ]
    );
    config.depth = 0;
    assert_eq!(config.problems().len(), 1);
}
