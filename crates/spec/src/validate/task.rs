//! Section `[task]`.

use super::Reader;
use crate::node::{Value, find};
use crate::run_spec::{Optimizer, Pool, TaskKind, TaskSpec};

/// Keys that change how images are shown to an encoder that learns.
const OF_FINETUNING: [&str; 7] = [
    "task.layer_decay",
    "task.drop_path",
    "task.mixup",
    "task.cutmix",
    "task.label_smoothing",
    "task.random_erasing",
    "task.rand_augment",
];

/// Their values where a spec fine-tunes and does not say.
const USUAL: [f64; 7] = [0.75, 0.1, 0.8, 1.0, 0.1, 0.25, 9.0];

/// Returns what a key of fine-tuning is where a spec does not say.
pub(crate) fn usual_of_finetuning(path: &str) -> Option<f64> {
    OF_FINETUNING.iter().position(|key| *key == path).map(|key| USUAL[key])
}

/// Values of these keys by which nothing is done.
const NOTHING: [f64; 7] = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];

impl Reader<'_> {
    /// Reads the section, if there is one; the inner `None` is a run without.
    pub(super) fn task(&mut self) -> Option<Option<TaskSpec>> {
        if find(self.root, "task").is_none() {
            return Some(None);
        }
        let kind = self.word("task.kind", TaskKind::ALL);
        let encoder = match find(self.root, "task.encoder") {
            Some(_) => self.place("task.encoder").map(Some),
            None => Some(None),
        };
        let classes = self.count("task.classes");
        let (pool, optimizer, usual) = match kind? {
            TaskKind::Finetune => (Pool::Avg, Optimizer::AdamW, USUAL),
            TaskKind::Linear => {
                self.refuse_of_finetuning();
                (Pool::Cls, Optimizer::Lars, NOTHING)
            }
        };
        let pool = self.word_or("task.pool", Pool::ALL, pool);
        self.pixels_are_for_probes(kind?, pool?);
        self.probes_need_two(kind?);
        let optimizer = self.word_or("task.optimizer", Optimizer::ALL, optimizer);
        let mut number = |key: usize| match find(self.root, OF_FINETUNING[key]) {
            Some(_) => self.float(OF_FINETUNING[key]),
            None => Some(usual[key]),
        };
        let numbers: [Option<f64>; 7] = std::array::from_fn(&mut number);
        let [layer_decay, drop_path, mixup, cutmix, label_smoothing, random_erasing, rand_augment] =
            numbers;
        let ema = match find(self.root, "task.ema") {
            Some(_) => self.float("task.ema").map(Some),
            None => Some(None),
        };
        Some(Some(TaskSpec {
            kind: kind?,
            encoder: encoder?,
            classes: classes?,
            pool: pool?,
            optimizer: optimizer?,
            layer_decay: layer_decay?,
            drop_path: drop_path?,
            mixup: mixup?,
            cutmix: cutmix?,
            label_smoothing: label_smoothing?,
            random_erasing: random_erasing?,
            rand_augment: rand_augment?,
            ema: ema?,
        }))
    }

    fn pixels_are_for_probes(&mut self, kind: TaskKind, pool: Pool) {
        if pool == Pool::Pixels && kind == TaskKind::Finetune {
            let message = "`task.pool` = \"pixels\" leaves nothing to fine-tune".to_string();
            let fix = "use \"avg\" or \"cls\", or `task.kind` = \"linear\"".to_string();
            self.problem_among(&["task.pool", "task.kind"], message, Some(fix));
        }
    }

    /// A probe's batch norm has the statistics of a slot: of one image they say nothing.
    fn probes_need_two(&mut self, kind: TaskKind) {
        let slot = find(self.root, "train.slot_batch").map(|node| &node.value);
        if kind == TaskKind::Linear && matches!(slot, Some(Value::Integer(1))) {
            let message =
                "`train.slot_batch` = 1 leaves the batch norm of `task.kind` = \"linear\" \
                           nothing to compare"
                    .to_string();
            let fix = Some("use `train.slot_batch` = 2 or more".to_string());
            self.problem_among(&["train.slot_batch", "task.kind"], message, fix);
        }
    }

    fn word_or<T: Copy>(&mut self, path: &str, all: &[(&'static str, T)], usual: T) -> Option<T> {
        match find(self.root, path) {
            Some(_) => self.word(path, all),
            None => Some(usual),
        }
    }

    /// A probe shows images as they are: keys of fine-tuning would promise something else, unless
    /// they say that nothing is done, as a printed spec does.
    fn refuse_of_finetuning(&mut self) {
        if let Some(node) = find(self.root, "task.ema") {
            let message = "`task.ema` has no meaning where `task.kind` = \"linear\"".to_string();
            self.problem(node.at, "task.ema", message, Some("remove it".to_string()));
        }
        for (path, nothing) in OF_FINETUNING.into_iter().zip(NOTHING) {
            let Some(node) = find(self.root, path) else { continue };
            let is_nothing = match node.value {
                Value::Float(x) => x == nothing,
                Value::Integer(n) => n as f64 == nothing,
                _ => false,
            };
            if !is_nothing {
                let message = format!("`{path}` has no meaning where `task.kind` = \"linear\"");
                self.problem(node.at, path, message, Some("remove it".to_string()));
            }
        }
    }
}
