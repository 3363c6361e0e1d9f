use super::*;
use crate::keymap::hf_encoder;

/// A file's tensors: key and shape, all of them F32 unless a test says otherwise.
type Tensors = Vec<(String, Vec<u64>)>;

fn micro() -> ModelConfig {
    ModelConfig::preset("micro").unwrap()
}

/// A file with everything, under names that `rename` gives to ours.
fn file(rename: impl Fn(&str) -> Vec<Mapped>) -> Tensors {
    let config = micro();
    let table = |name: &str, width: u32| (name.to_string(), vec![1, 17, u64::from(width)]);
    let mut all: Tensors =
        vec![table("pos_embed", config.width), table("decoder_pos_embed", config.decoder_width)];
    let shape = |shape: &[usize]| shape.iter().map(|&n| n as u64).collect();
    all.extend(config.params().into_iter().map(|param| (param.name, shape(&param.shape))));
    let mut out: Tensors = Vec::new();
    for (name, shape) in all {
        for target in rename(&name) {
            let mut shape = shape.clone();
            shape[0] = target.part.rows(shape[0] as usize).len() as u64;
            out.push((target.name, shape));
        }
    }
    out
}

fn whole(name: &str) -> Vec<Mapped> {
    vec![Mapped { name: name.to_string(), part: Part::Whole }]
}

fn v4(name: &str) -> Vec<Mapped> {
    hf(name, HfNames::V4).unwrap()
}

fn v5(name: &str) -> Vec<Mapped> {
    hf(name, HfNames::V5).unwrap()
}

/// Names as transformers 5.23 writes them when it saves.
fn resaved(name: &str) -> Vec<Mapped> {
    let rename = |target: Mapped| {
        let name = target.name.replace("decoder.decoder_layers.", "decoder.decoder_encoder.layer.");
        Mapped { name, ..target }
    };
    v4(name).into_iter().map(rename).collect()
}

fn encoder(name: &str) -> Vec<Mapped> {
    crate::keymap::timm(name).map_or(Vec::new(), |name| whole(&name))
}

fn plan_of(tensors: &Tensors, wanted: Wanted) -> Result<Plan, MapError> {
    let foreign: Vec<Foreign<'_>> =
        tensors.iter().map(|(name, shape)| Foreign { name, dtype: "F32", shape }).collect();
    plan(&micro(), &foreign, wanted)
}

fn refused(tensors: &Tensors, wanted: Wanted) -> String {
    plan_of(tensors, wanted).unwrap_err().to_string()
}

/// Every element of our tensors is taken once, or drawn.
fn assert_whole(plan: &Plan) {
    let layout = Layout::new(micro().params());
    let mut seen: Vec<Vec<Range<usize>>> = vec![Vec::new(); layout.n_blocks()];
    plan.takes.iter().for_each(|take| seen[take.block].push(take.elements.clone()));
    for (block, param) in layout.params().iter().enumerate() {
        if plan.seeded.contains(&block) {
            assert!(is_decoder(&param.name) && seen[block].is_empty(), "{}", param.name);
            continue;
        }
        let mut at = 0;
        for elements in &seen[block] {
            assert_eq!(elements.start, at, "{}", param.name);
            at = elements.end;
        }
        assert_eq!(at, param.numel(), "{}", param.name);
    }
}

#[test]
fn every_form_is_recognised_and_gives_the_whole_model() {
    type Rename = fn(&str) -> Vec<Mapped>;
    let forms: [(Rename, Form, usize, usize); 6] = [
        (whole, Form::Mae, 0, 2),
        (encoder, Form::Timm, 19, 1),
        (v4, Form::Hf4, 0, 2),
        (v5, Form::Hf5, 0, 2),
        (resaved, Form::HfResaved, 0, 2),
        (|name| hf_encoder(name).unwrap_or_default(), Form::HfEncoder, 19, 1),
    ];
    for (rename, form, n_seeded, n_tables) in forms {
        let mut tensors = file(rename);
        // Keys come in any order.
        tensors.reverse();
        let plan = plan_of(&tensors, Wanted::Any).unwrap();
        assert_eq!((plan.form, plan.seeded.len(), plan.tables.len()), (form, n_seeded, n_tables));
        assert!(plan.tables.iter().all(|table| table.fits), "{form:?}");
        assert_whole(&plan);
        for (wanted, suits) in [
            (Wanted::Mae, matches!(form, Form::Mae | Form::Timm)),
            (Wanted::Timm, form == Form::Timm),
            (Wanted::Hf, form.is_hf()),
        ] {
            assert_eq!(plan_of(&tensors, wanted).is_ok(), suits, "{form:?} as {wanted:?}");
        }
    }
    let text = refused(&file(v4), Wanted::Timm);
    assert_eq!(text, "the file has Hugging Face's names (transformers 4)");
}

#[test]
fn thirds_go_to_their_rows() {
    let plan = plan_of(&file(v5), Wanted::Any).unwrap();
    let take = |key: &str| plan.takes.iter().find(|take| take.source == key).unwrap();
    let at = |key: &str| take(key).elements.clone();
    assert_eq!(at("vit.layers.1.attention.q_proj.weight"), 0..64);
    assert_eq!(at("vit.layers.1.attention.k_proj.weight"), 64..128);
    assert_eq!(at("vit.layers.1.attention.v_proj.bias"), 16..24);
}

/// Traps 1 and 2: what timm has for fine-tuning is understood, and only there.
#[test]
fn a_pooled_norm_is_the_norm_and_a_classifier_is_left_out() {
    let rename = |name: &str| {
        encoder(name).into_iter().map(|t| Mapped { name: pooled_name(&t.name), ..t }).collect()
    };
    let mut tensors = file(rename);
    tensors.push(("head.weight".to_string(), vec![1000, 8]));
    tensors.push(("head.bias".to_string(), vec![1000]));
    let plan = plan_of(&tensors, Wanted::Any).unwrap();
    assert_eq!(plan.ignored, ["head.weight", "head.bias"]);
    assert_whole(&plan);
    assert!(plan.takes.iter().any(|take| take.source == "fc_norm.weight"));
    assert!(plan_of(&tensors, Wanted::Timm).is_ok());
    assert_eq!(
        refused(&tensors, Wanted::Mae),
        "`fc_norm.bias` [8] is not of a masked autoencoder\n  \
         `fc_norm.weight` [8] is not of a masked autoencoder\n  \
         `head.weight` [1000, 8] is not of a masked autoencoder\n  \
         `head.bias` [1000] is not of a masked autoencoder\n  \
         `norm.bias` is missing\n  \
         `norm.weight` is missing"
    );
    let mut whole_model = file(whole);
    whole_model.push(("head.bias".to_string(), vec![1000]));
    assert!(refused(&whole_model, Wanted::Any).contains("`head.bias` [1000] is not of"));
    tensors.push(("norm.bias".to_string(), vec![8]));
    assert_eq!(refused(&tensors, Wanted::Any), "`norm.bias` [8] gives the same as `fc_norm.bias`");
}

/// What transformers has behind an encoder is left out, and only where there is no decoder.
#[test]
fn heads_of_transformers_are_left_out() {
    type Rename = fn(&str) -> Vec<Mapped>;
    let of_encoder = |rename: Rename| {
        file(|name| crate::keymap::timm(name).map_or(Vec::new(), |name| rename(&name)))
    };
    let bare: Rename = |name| hf_encoder(name).unwrap_or_default();
    let classifier = ["classifier.bias", "classifier.weight"];
    // ViTForImageClassification, the same with a pooler, and ViTModel.
    let files: [(Rename, Form, &[&str]); 4] = [
        (v4, Form::Hf4, &classifier),
        (v5, Form::Hf5, &classifier),
        (v4, Form::Hf4, &["vit.pooler.dense.bias", "classifier.weight"]),
        (bare, Form::HfEncoder, &["pooler.dense.bias", "pooler.dense.weight"]),
    ];
    for (rename, form, heads) in files {
        let mut tensors = of_encoder(rename);
        tensors.extend(heads.iter().map(|head| (head.to_string(), vec![8])));
        for wanted in [Wanted::Any, Wanted::Hf] {
            let plan = plan_of(&tensors, wanted).unwrap();
            assert_eq!((plan.form, plan.seeded.len(), plan.tables.len()), (form, 19, 1));
            assert_eq!(plan.ignored, heads);
            assert_whole(&plan);
        }
        assert_eq!(inferred(&tensors).unwrap().decoder, None);
    }
    for head in ["classifier.weight", "vit.pooler.dense.bias"] {
        let mut tensors = file(v4);
        tensors.push((head.to_string(), vec![8]));
        let text = format!("`{head}` [8] is not of a masked autoencoder");
        assert_eq!(refused(&tensors, Wanted::Any), text);
    }
    let mut tensors = file(encoder);
    tensors.push(("classifier.weight".to_string(), vec![8]));
    assert!(refused(&tensors, Wanted::Any).contains("`classifier.weight` [8] is not of"));
}

fn pooled_name(name: &str) -> String {
    match name.strip_prefix("norm.") {
        Some(leaf) => format!("fc_norm.{leaf}"),
        None => name.to_string(),
    }
}

#[test]
fn all_differences_are_named_at_once() {
    let mut tensors = file(v4);
    tensors.retain(|(name, _)| !name.contains("layer.1.layernorm_after"));
    for (name, shape) in &mut tensors {
        match name.as_str() {
            "vit.encoder.layer.0.attention.attention.key.weight" => shape[1] = 9,
            "vit.layernorm.bias" => *shape = vec![2, 4],
            "decoder.decoder_pos_embed" => shape[2] = 12,
            _ => {}
        }
    }
    tensors.push(("vit.encoder.layer.2.layernorm_after.bias".to_string(), vec![8]));
    tensors.push(("vit.pooler.dense.bias\n".to_string(), vec![8]));
    tensors.push(("decoder.decoder_encoder.layer.0.layernorm_after.bias".to_string(), vec![8]));
    let differences = refused(&tensors, Wanted::Any);
    let mut lines: Vec<&str> = differences.split("\n  ").collect();
    lines.sort();
    assert_eq!(
        lines,
        [
            "`decoder.decoder_encoder.layer.0.layernorm_after.bias` [8] gives the same as \
             `decoder.decoder_layers.0.layernorm_after.bias`, our `decoder_blocks.0.norm2.bias`",
            "`decoder.decoder_pos_embed` [1, 17, 12] is not [1, any, 8], our `decoder_pos_embed`",
            "`vit.encoder.layer.0.attention.attention.key.weight` [8, 9] is not [8, 8], our second \
             third of `blocks.0.attn.qkv.weight`",
            "`vit.encoder.layer.1.layernorm_after.bias` is missing, our `blocks.1.norm2.bias`",
            "`vit.encoder.layer.1.layernorm_after.weight` is missing, our `blocks.1.norm2.weight`",
            "`vit.encoder.layer.2.layernorm_after.bias` [8] is not in this model, our \
             `blocks.2.norm2.bias`",
            "`vit.layernorm.bias` [2, 4] is not [8], our `norm.bias`",
            "`vit.pooler.dense.bias\\n` [8] is not of a masked autoencoder",
        ]
    );
}

#[test]
fn half_a_decoder_is_not_made_up() {
    let mut tensors = file(whole);
    tensors.retain(|(name, _)| !name.starts_with("decoder_") || name == "decoder_norm.bias");
    let text = refused(&tensors, Wanted::Any);
    assert_eq!(text.lines().count(), 17, "{text}");
    assert!(text.lines().all(|line| line.trim().ends_with("is missing")), "{text}");
    // A table is no decoder.
    let mut tensors = file(encoder);
    tensors.push(("decoder_pos_embed".to_string(), vec![1, 17, 8]));
    assert_eq!(plan_of(&tensors, Wanted::Any).unwrap().seeded.len(), 19);
}

/// Trap 5: a table for another grid is not resized.
#[test]
fn tables_of_other_grids_do_not_fit_and_are_no_difference() {
    let mut tensors = file(v4);
    for (name, shape) in &mut tensors {
        if name == "vit.embeddings.position_embeddings" {
            shape[1] = 26;
        }
    }
    let plan = plan_of(&tensors, Wanted::Any).unwrap();
    let table = plan.tables.iter().find(|table| table.ours == "pos_embed").unwrap();
    assert_eq!((table.rows, table.fits), (26, false));
}

#[test]
fn other_element_types_are_refused() {
    let tensors = file(whole);
    let foreign: Vec<Foreign<'_>> = tensors
        .iter()
        .map(|(name, shape)| match name.as_str() {
            "norm.bias" => Foreign { name, dtype: "F64", shape },
            "norm.weight" => Foreign { name, dtype: "F16", shape },
            _ => Foreign { name, dtype: "BF16", shape },
        })
        .collect();
    let error = plan(&micro(), &foreign, Wanted::Any).unwrap_err().to_string();
    assert_eq!(error, "`norm.bias` is F64, not F32, BF16, F16");
}

#[test]
fn other_files_are_refused() {
    let names = |names: &[&str]| names.iter().map(|n| (n.to_string(), vec![8])).collect();
    let start = "no key is one of a masked autoencoder's in the layouts mae, timm and hf; the file \
                 has";
    assert_eq!(refused(&names(&[]), Wanted::Any), format!("{start} none"));
    assert_eq!(
        refused(&names(&["a", "b", "c\u{7}", "d"]), Wanted::Any),
        format!("{start} `a`, `b`, `c\\u{{7}}`, …")
    );
    assert_eq!(
        refused(&names(&["cls_token", "vit.layernorm.bias"]), Wanted::Any),
        "`cls_token` is a key of the reference or timm, `vit.layernorm.bias` one of Hugging Face's"
    );
}

fn inferred(tensors: &Tensors) -> Result<Inferred, MapError> {
    let foreign: Vec<Foreign<'_>> =
        tensors.iter().map(|(name, shape)| Foreign { name, dtype: "F32", shape }).collect();
    infer(&foreign)
}

#[test]
fn sizes_are_read_from_shapes() {
    let sizes = |form, decoder| Inferred {
        form,
        patch_size: 2,
        channels: 3,
        width: 8,
        depth: 2,
        mlp_ratio: 4,
        table_rows: Some(17),
        decoder,
    };
    let whole_model = Some([8, 1]);
    assert_eq!(inferred(&file(whole)).unwrap(), sizes(Form::Mae, whole_model));
    assert_eq!(inferred(&file(v4)).unwrap(), sizes(Form::Hf4, whole_model));
    assert_eq!(inferred(&file(v5)).unwrap(), sizes(Form::Hf5, whole_model));
    assert_eq!(inferred(&file(resaved)).unwrap(), sizes(Form::HfResaved, whole_model));
    assert_eq!(inferred(&file(encoder)).unwrap(), sizes(Form::Timm, None));
    let mut bare = file(encoder);
    bare.retain(|(name, _)| name != "pos_embed");
    assert_eq!(inferred(&bare).unwrap().table_rows, None);
}

#[test]
fn sizes_that_make_no_model_are_refused() {
    let refused = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = file(whole);
        change(&mut tensors);
        inferred(&tensors).unwrap_err().to_string()
    };
    let set = |tensors: &mut Tensors, name: &str, shape: &[u64]| {
        let tensor = tensors.iter_mut().find(|(known, _)| known == name).unwrap();
        tensor.1 = shape.to_vec();
    };
    let projection = "patch_embed.proj.weight";
    assert_eq!(
        refused(&|t| t.retain(|(name, _)| !name.starts_with("patch_embed"))),
        "the patch size cannot be told: its tensor is missing\n  \
         the number of channels cannot be told: its tensor is missing\n  \
         the width cannot be told: its tensor is missing"
    );
    assert_eq!(
        refused(&|t| set(t, projection, &[8, 3, 2, 4])),
        "patches of 2x4 pixels are not square"
    );
    assert_eq!(refused(&|t| set(t, projection, &[8, 1 << 40, 2, 2])), {
        "the number of channels is too large"
    });
    let odd = "an MLP of 32 is not a multiple of the width 0";
    assert_eq!(refused(&|t| set(t, projection, &[0, 3, 2, 2])), odd);
    let name = format!("blocks.{}.norm1.bias", u64::MAX);
    assert_eq!(refused(&|t| t.push((name.clone(), vec![8]))), "the number of blocks is too large");
}
