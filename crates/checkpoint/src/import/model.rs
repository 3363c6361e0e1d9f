//! The model that weights belong to, for those who have no spec of it: what the files say, what
//! their tensors show, and what a person adds.

use lacuna_recipe::init;
use lacuna_recipe::keymap::import::{Foreign, Form, Inferred, Wanted, infer};
use lacuna_recipe::model::{ModelConfig, PRESETS};
use lacuna_recipe::state::Layout;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ImportError, Weights, config_notices, fit, model_config, table_values, take};

/// Key of the metadata under which our exports say what they are of.
pub(crate) const ABOUT_KEY: &str = "lacuna.model";

/// What an export says of its model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct About {
    pub model: ModelConfig,
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
}

/// What a person says of a model; it wins over what is guessed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Given {
    /// Attention heads of the encoder.
    pub heads: Option<u32>,
    /// Attention heads of the decoder.
    pub decoder_heads: Option<u32>,
    /// Height and width of its images, used where the position table is for no square.
    pub img_size: Option<[u32; 2]>,
    /// Whether the decoder predicts patches that are normalised one by one.
    pub norm_pix_loss: Option<bool>,
    /// The decoder will not be used: nothing has to be known of it.
    pub encoder_alone: bool,
}

/// A model that was recognised and not read yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Described {
    /// Whose names the file has.
    pub form: Form,
    /// Its sizes; without a decoder, that of the smallest one there is.
    pub config: ModelConfig,
    /// Whether the file has a decoder.
    pub has_decoder: bool,
    /// Mean and deviation of each channel, in units of full brightness, where the files say them.
    pub normalization: Option<(Vec<f64>, Vec<f64>)>,
    /// What a person should know: what was guessed, what differs.
    pub notices: Vec<String>,
}

/// A model that cannot be told from its file.
#[derive(Debug, thiserror::Error)]
pub enum DescribeError {
    /// The files cannot be read or are of something else.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// Nothing shows how many attention heads there are.
    #[error(
        "how many attention heads the {stack} has is not in the file, and no preset is {width} \
         wide and {depth} deep"
    )]
    Heads {
        /// `encoder` or `decoder`.
        stack: &'static str,
        /// Its width.
        width: u32,
        /// Its blocks.
        depth: u32,
    },
    /// Nothing shows the height and width of images.
    #[error(
        "for which image size the file is cannot be told: its position table is for {} patches, \
         which make no square",
        patches.map_or("no known number of".to_string(), |n| n.to_string())
    )]
    ImgSize {
        /// Patches of the position table, if there is one.
        patches: Option<u64>,
    },
    /// The tensors contradict each other.
    #[error("the file's tensors make no model:\n  {}", problems.join("\n  "))]
    Sizes {
        /// All that is wrong.
        problems: Vec<String>,
    },
}

/// The numbers of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelWeights {
    /// All parameters, laid out as [`Layout`] does; a decoder that is not there is drawn.
    pub params: Vec<f32>,
    /// The encoder's position table, `[1 + l, d]`, where it is not the sine-cosine table.
    pub encoder_table: Option<Vec<f32>>,
    /// The decoder's, likewise.
    pub decoder_table: Option<Vec<f32>>,
    /// Keys that were left out: a classifier's.
    pub ignored: Vec<String>,
}

/// What files say of a model beside its tensors.
#[derive(Default)]
struct Said {
    heads: Option<u32>,
    decoder_heads: Option<u32>,
    img_size: Option<[u32; 2]>,
    mask_ratio: Option<f64>,
    norm_pix_loss: Option<bool>,
    normalization: Option<(Vec<f64>, Vec<f64>)>,
}

/// Share of removed patches where nothing is said.
const MASK_RATIO: f64 = 0.75;

/// Tells which model `weights` are of.
pub fn describe(weights: &Weights, given: &Given) -> Result<Described, DescribeError> {
    let inferred = infer(&foreign(weights)).map_err(ImportError::Map)?;
    let said = match weights.about(ABOUT_KEY) {
        Some(text) => said_by_export(weights, text)?,
        None => said_by_documents(weights),
    };
    let mut notices: Vec<String> = Vec::new();
    let config = config(&inferred, &said, given, &mut notices)?;
    let problems: Vec<String> = config.problems().iter().map(ToString::to_string).collect();
    if !problems.is_empty() {
        return Err(DescribeError::Sizes { problems });
    }
    match fit(weights, &config, Wanted::Any) {
        Ok(_) => {}
        Err(ImportError::Mismatch { differences: problems }) => {
            return Err(DescribeError::Sizes { problems });
        }
        Err(error) => return Err(error.into()),
    }
    notices.extend(model_config(weights).map_or(Vec::new(), |c| config_notices(c, &config)));
    let has_decoder = inferred.decoder.is_some();
    let normalization = said.normalization;
    Ok(Described { form: inferred.form, config, has_decoder, normalization, notices })
}

/// Reads the model that [`describe`] found.
pub fn read_model(weights: &Weights, config: &ModelConfig) -> Result<ModelWeights, ImportError> {
    let plan = fit(weights, config, Wanted::Any)?;
    let layout = Layout::new(config.params());
    let mut params = take(weights, &plan, &layout)?;
    for &block in &plan.seeded {
        init::fill(&layout.params()[block], 0, &mut params[layout.range(block)]);
    }
    let (mut encoder_table, mut decoder_table) = (None, None);
    for table in &plan.tables {
        if !table.fits {
            let [rows, columns] = config.grid();
            let differences = vec![format!(
                "`{}` has {} rows, not one for the class token and one for each of {rows} x \
                 {columns} patches",
                table.source.escape_debug(),
                table.rows
            )];
            return Err(ImportError::Mismatch { differences });
        }
        let (values, off, tolerance) = table_values(weights, config, table)?;
        if values.iter().any(|x| !x.is_finite()) {
            let tensors = vec![format!("`{}`", table.source.escape_debug())];
            return Err(ImportError::NotFinite { tensors });
        }
        let own = (off > tolerance).then_some(values);
        match table.ours {
            "pos_embed" => encoder_table = own,
            _ => decoder_table = own,
        }
    }
    Ok(ModelWeights { params, encoder_table, decoder_table, ignored: plan.ignored })
}

fn foreign(weights: &Weights) -> Vec<Foreign<'_>> {
    let one = |(name, t)| {
        let (name, t): (&String, &super::tensor_file::Tensor) = (name, t);
        Foreign { name, dtype: &t.dtype, shape: &t.shape }
    };
    weights.tensors().map(one).collect()
}

/// Puts the sizes together.
fn config(
    inferred: &Inferred,
    said: &Said,
    given: &Given,
    notices: &mut Vec<String>,
) -> Result<ModelConfig, DescribeError> {
    let Inferred { patch_size, channels, width, depth, mlp_ratio, .. } = *inferred;
    // Each preset: image side, patch, channels, width, depth, heads, and the same of the decoder.
    let encoder = |p: &[u32; 9]| (p[1], p[3], p[4]) == (patch_size, width, depth);
    let guessed = PRESETS.iter().find(|(_, p)| encoder(p)).map(|(name, p)| (*name, p[5]));
    let missing = DescribeError::Heads { stack: "encoder", width, depth };
    let heads = heads(given.heads.or(said.heads), guessed, "encoder", notices).ok_or(missing)?;
    // Without a decoder, the smallest that a model can be built with.
    let [decoder_width, decoder_depth] = inferred.decoder.unwrap_or([4, 1]);
    let decoder_heads = match inferred.decoder {
        None => 1,
        // Any number gives the same parameters.
        Some(_) if given.encoder_alone => said.decoder_heads.unwrap_or(1),
        Some([width, depth]) => {
            let decoder = |p: &[u32; 9]| (p[6], p[7]) == (width, depth);
            let guessed = PRESETS.iter().find(|(_, p)| decoder(p)).map(|(name, p)| (*name, p[8]));
            let known = given.decoder_heads.or(said.decoder_heads);
            let missing = DescribeError::Heads { stack: "decoder", width, depth };
            self::heads(known, guessed, "decoder", notices).ok_or(missing)?
        }
    };
    let norm_pix_loss = given.norm_pix_loss.or(said.norm_pix_loss);
    if norm_pix_loss.is_none() && inferred.decoder.is_some() && !given.encoder_alone {
        notices.push(
            "whether the decoder predicts normalised patches (norm_pix_loss) is not in the file: \
             taken as true"
                .to_string(),
        );
    }
    Ok(ModelConfig {
        img_size: img_size(inferred, said, given)?,
        patch_size,
        channels,
        width,
        depth,
        heads,
        decoder_width,
        decoder_depth,
        decoder_heads,
        mlp_ratio,
        mask_ratio: said.mask_ratio.unwrap_or(MASK_RATIO),
        norm_pix_loss: norm_pix_loss.unwrap_or(true),
    })
}

/// Returns what is known, else what a preset of the same sizes has, with a notice.
fn heads(
    known: Option<u32>,
    guessed: Option<(&str, u32)>,
    stack: &str,
    notices: &mut Vec<String>,
) -> Option<u32> {
    if known.is_some() {
        return known;
    }
    let (preset, heads) = guessed?;
    notices.push(format!(
        "how many attention heads the {stack} has is not in the file: {heads}, as in preset \
         `{preset}`"
    ));
    Some(heads)
}

/// Finds the image size of the file's position table.
fn img_size(inferred: &Inferred, said: &Said, given: &Given) -> Result<[u32; 2], DescribeError> {
    let patches = inferred.table_rows.map(|rows| rows.saturating_sub(1));
    if let Some(size) = said.img_size {
        return Ok(size);
    }
    let p = u64::from(inferred.patch_size.max(1));
    let square = patches.map(u64::isqrt).filter(|&side| Some(side * side) == patches);
    if let Some(side) = square.and_then(|side| u32::try_from(side * p).ok()) {
        return Ok([side, side]);
    }
    let fits = |size: &[u32; 2]| {
        let [rows, columns] = size.map(|side| u64::from(side) / p);
        patches.is_none_or(|n| n == rows * columns)
    };
    given.img_size.filter(fits).ok_or(DescribeError::ImgSize { patches })
}

/// Reads what our own export says.
fn said_by_export(weights: &Weights, text: &str) -> Result<Said, ImportError> {
    let about: About = serde_json::from_str(text).map_err(|error| ImportError::Unsound {
        path: weights.path().to_path_buf(),
        problem: format!("its `{ABOUT_KEY}` cannot be understood: {error}"),
    })?;
    let About { model, mean, std } = about;
    Ok(Said {
        heads: Some(model.heads),
        decoder_heads: Some(model.decoder_heads),
        img_size: Some(model.img_size),
        mask_ratio: Some(model.mask_ratio),
        norm_pix_loss: Some(model.norm_pix_loss),
        normalization: Some((mean, std)),
    })
}

/// Reads what timm's document on the hub says, which has no `model_type`.
fn said_by_timm(weights: &Weights) -> Said {
    let pretrained = weights.config.as_ref().and_then(|(_, config)| config.get("pretrained_cfg"));
    let floats = |key: &str| -> Option<Vec<f64>> {
        pretrained?.get(key)?.as_array()?.iter().map(Value::as_f64).collect()
    };
    Said { normalization: floats("mean").zip(floats("std")), ..Said::default() }
}

/// Reads what the documents of transformers say.
fn said_by_documents(weights: &Weights) -> Said {
    let Some(config) = model_config(weights) else { return said_by_timm(weights) };
    let number = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
    let field = |key: &str| config.get(key).and_then(number);
    let img_size = config.get("image_size").and_then(|size| match size.as_array() {
        None => number(size).map(|side| [side, side]),
        Some(sides) => match sides.as_slice() {
            [height, width] => Some([number(height)?, number(width)?]),
            _ => None,
        },
    });
    let floats = |key: &str| -> Option<Vec<f64>> {
        weights.processor.as_ref()?.get(key)?.as_array()?.iter().map(Value::as_f64).collect()
    };
    Said {
        heads: field("num_attention_heads"),
        decoder_heads: field("decoder_num_attention_heads"),
        img_size,
        mask_ratio: config.get("mask_ratio").and_then(Value::as_f64),
        norm_pix_loss: config.get("norm_pix_loss").and_then(Value::as_bool),
        normalization: floats("image_mean").zip(floats("image_std")),
    }
}
