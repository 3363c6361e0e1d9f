//! Built-in specs: the layer of defaults, and the presets that `base = "preset:…"` names.

/// The lowest layer of every spec: defaults with their sources.
pub const DEFAULTS: &str = include_str!("../presets/defaults.toml");

/// A built-in spec.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// Name behind `preset:`.
    pub name: &'static str,
    /// Other names of the same preset.
    pub aliases: &'static [&'static str],
    /// TOML; may itself be based on another preset.
    pub text: &'static str,
}

macro_rules! preset {
    ($name:literal, $aliases:expr) => {
        Preset {
            name: $name,
            aliases: $aliases,
            text: include_str!(concat!("../presets/", $name, ".toml")),
        }
    };
}

/// Every preset, small models first.
pub const PRESETS: &[Preset] = &[
    preset!("micro", &[]),
    preset!("demo", &[]),
    preset!("demo-linear", &[]),
    preset!("demo-finetune", &[]),
    preset!("in1k-recipe", &[]),
    preset!("tiny", &[]),
    preset!("small", &[]),
    preset!("base", &["mae-vit-base-in1k"]),
    preset!("base-linear", &[]),
    preset!("base-finetune", &[]),
    preset!("large", &["mae-vit-large-in1k"]),
    preset!("large-linear", &[]),
    preset!("large-finetune", &[]),
    preset!("huge", &["mae-vit-huge-in1k"]),
    preset!("huge-linear", &[]),
    preset!("huge-finetune", &[]),
];

/// Looks a preset up by its name or an alias.
pub fn find(name: &str) -> Option<&'static Preset> {
    let is = |preset: &&Preset| preset.name == name || preset.aliases.contains(&name);
    PRESETS.iter().find(is)
}

/// Lists all names and aliases.
pub fn names() -> impl Iterator<Item = &'static str> {
    let names = |preset: &'static Preset| [preset.name].into_iter().chain(preset.aliases.to_vec());
    PRESETS.iter().flat_map(names)
}
