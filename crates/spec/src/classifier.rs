//! What a run of a task has for tensors, and what an image costs it.

use lacuna_recipe::keymap;
use lacuna_recipe::model::{Init, ModelConfig, ParamSpec};

use crate::run_spec::{Pool, RunSpec, TaskKind, TaskSpec};

/// Lists the tensors of a classifier: the encoder's under timm's names, and a head.
pub fn classifier_params(task: &TaskSpec, model: &ModelConfig) -> Vec<ParamSpec> {
    let (n_classes, width) = (task.classes as usize, feature_width(task, model));
    // Deviations of the reference: 2e-5 in fine-tuning, 0.01 in a probe.
    let deviation = match task.kind {
        TaskKind::Finetune => 2e-5,
        TaskKind::Linear => 0.01,
    };
    let param =
        |name: &str, shape: Vec<usize>, init: Init| ParamSpec { name: name.into(), shape, init };
    let mut out = vec![
        param("head.bias", vec![n_classes], Init::Zeros),
        param("head.weight", vec![n_classes, width], Init::Normal { deviation }),
    ];
    if task.kind == TaskKind::Finetune {
        let encoder = model.params().into_iter().filter(|p| keymap::timm(&p.name).is_some());
        out.extend(encoder.map(|p| ParamSpec { name: own_name(task.pool, &p.name), ..p }));
        let positions = vec![1, 1 + model.n_patches(), model.width as usize];
        out.push(param("pos_embed", positions, Init::Zeros));
    }
    out.sort_by(|a, b| a.name.cmp(&b.name));
    out
}

/// Lists the tensors of a run's state: a classifier's, and their averages where it keeps some.
pub fn state_params(task: &TaskSpec, model: &ModelConfig) -> Vec<ParamSpec> {
    let mut out = classifier_params(task, model);
    if task.ema.is_some() {
        let average = |p: &ParamSpec| ParamSpec { name: averaged(&p.name), ..p.clone() };
        out.extend(out.iter().map(average).collect::<Vec<ParamSpec>>());
    }
    out
}

/// Returns the name of a tensor's average.
pub fn averaged(name: &str) -> String {
    format!("{}{name}", keymap::AVERAGE)
}

/// Returns the number of values that a head reads.
pub fn feature_width(task: &TaskSpec, model: &ModelConfig) -> usize {
    match task.pool {
        Pool::Avg | Pool::Cls => model.width as usize,
        Pool::Pixels => (model.channels * model.img_size[0] * model.img_size[1]) as usize,
    }
}

/// Returns the name of an encoder's tensor in a classifier: where the head reads the mean, the last
/// norm comes behind it and is called so.
pub fn own_name(pool: Pool, name: &str) -> String {
    match (pool, name.strip_prefix("norm.")) {
        (Pool::Avg, Some(rest)) => format!("fc_norm.{rest}"),
        _ => name.to_string(),
    }
}

impl RunSpec {
    /// Lists the tensors of the run's state.
    pub fn params(&self) -> Vec<ParamSpec> {
        match &self.task {
            Some(task) => state_params(task, &self.model),
            None => self.model.params(),
        }
    }

    /// Returns the FLOPs of one image, forward and as far back as something learns.
    pub fn train_flops(&self) -> f64 {
        let Some(task) = &self.task else { return self.model.train_flops() };
        let head = 3.0 * 2.0 * f64::from(task.classes) * feature_width(task, &self.model) as f64;
        let encoder = match (task.kind, task.pool) {
            (TaskKind::Finetune, _) => self.model.encoder_flops(true),
            (TaskKind::Linear, Pool::Pixels) => 0.0,
            (TaskKind::Linear, _) => self.model.encoder_flops(false),
        };
        head + encoder
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_plan_of_a_task_is_not_that_of_its_encoder() {
        let spec = |task: &str| {
            let text = format!(
                "schema = 1\nname = \"a\"\nbase = \"preset:micro\"\ndata.shards = \"d\"\n\
                 [task]\nclasses = 4\n{task}\n"
            );
            crate::parse_text("run.toml", &text, &[]).unwrap().spec
        };
        let probe = spec("kind = \"linear\"");
        let report = crate::plan(&probe, None);
        assert_eq!((report.n_params, report.n_tensors), (4 * 8 + 4, 2));
        let tuned = crate::plan(&spec("kind = \"finetune\""), None);
        let kept = crate::plan(&spec("kind = \"finetune\"\nema = 0.99"), None);
        assert_eq!(kept.n_params, 2 * tuned.n_params);
        assert_eq!(kept.checkpoint_bytes, 2 * tuned.checkpoint_bytes);
        // A step of fine-tuning is a forward and two backward passes, but for the first layer.
        let ratio = tuned.flops_per_image / report.flops_per_image;
        assert!(ratio > 2.5 && ratio < 3.0, "{ratio}");
        let pixels = crate::plan(&spec("kind = \"linear\"\npool = \"pixels\""), None);
        assert_eq!(pixels.flops_per_image, 6.0 * 4.0 * 8.0 * 8.0 * 3.0);
        assert!(tuned.to_string().contains("all of them are seen"), "{tuned}");
    }
}
