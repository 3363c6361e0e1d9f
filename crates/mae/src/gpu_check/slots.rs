//! Slots on a device: their bits, their independence of what ran before, and their time.

use std::time::Instant;

use anyhow::ensure;
use lacuna_mae::mae::{Mae, Masks, PosTables};
use lacuna_mae::weights::Weights;
use lacuna_recipe::digest::{Crc64, hex};
use lacuna_recipe::init;
use lacuna_recipe::mask::MaskOrder;
use lacuna_recipe::model::ModelConfig;
use lacuna_recipe::state::Layout;
use serde_json::{Value, json};
use tch::{Cuda, Device, Kind, Tensor};

/// Seed of weights, images and masks.
const SEED: u64 = 0x6C61_6375_6E61;
/// How often the same slot is computed.
const REPEATS: usize = 3;
/// Orders in which the same slots are computed; the first is what the others must equal.
const ORDERS: [[u32; 4]; 3] = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]];
/// Slots before the timed ones: libraries load, algorithms are chosen, memory is allocated.
const WARM_UP: u32 = 3;

/// A model with its initial weights, ready to compute slots of one shape in f32.
#[derive(Debug)]
pub struct Slots {
    model: ModelConfig,
    images: u32,
    device: Device,
    weights: Weights,
    tables: PosTables,
}

/// Data of one slot on the device.
struct Input {
    images_bchw: Tensor,
    masks: Masks,
    weights_b: Tensor,
}

/// Seconds of timed slots.
#[derive(Clone, Copy, Debug)]
pub struct Timed {
    /// Fastest.
    pub min_seconds: f64,
    /// Half of the slots took at most this.
    pub median_seconds: f64,
    /// Slowest.
    pub max_seconds: f64,
    /// Loss of the last one.
    pub loss: f64,
}

impl Slots {
    /// Puts the model's initial weights on the device.
    pub fn new(model: &ModelConfig, images: u32, device: Device) -> Self {
        let layout = Layout::new(model.params());
        let mut flat: Vec<f32> = vec![0.0; layout.numel()];
        for (block, spec) in layout.params().iter().enumerate() {
            init::fill(spec, SEED, &mut flat[layout.range(block)]);
        }
        Slots {
            weights: Weights::copy_of(&layout, &flat).to_device(device).trainable(),
            tables: PosTables::new(model, Kind::Float).to_device(device),
            model: model.clone(),
            images,
            device,
        }
    }

    /// Computes one slot several times: the bits of loss and gradients must be the same.
    pub fn repeat(&self) -> anyhow::Result<(bool, String, Value)> {
        let digests: Vec<u64> =
            (0..REPEATS).map(|_| self.digest(0)).collect::<anyhow::Result<_>>()?;
        let same = digests.iter().all(|digest| *digest == digests[0]);
        let shown: Vec<String> = digests.iter().map(|&digest| hex(digest)).collect();
        let text = if same {
            format!("digest {}, {REPEATS} times", shown[0])
        } else {
            format!("digests {}", shown.join(", "))
        };
        Ok((same, text, json!({ "digests": shown })))
    }

    /// Computes several slots in several orders: a slot's bits must not depend on what ran before.
    pub fn orders(&self) -> anyhow::Result<(bool, String, Value)> {
        let mut by_order: Vec<Vec<u64>> = Vec::new();
        for order in ORDERS {
            let mut digests: Vec<u64> = vec![0; order.len()];
            for slot in order {
                digests[slot as usize] = self.digest(slot)?;
            }
            by_order.push(digests);
        }
        let same = by_order.iter().all(|digests| *digests == by_order[0]);
        let mut distinct = by_order[0].clone();
        distinct.sort_unstable();
        distinct.dedup();
        // Slots of other data with the same digest would mean that the digest sees nothing.
        let told_apart = distinct.len() == ORDERS[0].len();
        let text = match (same, told_apart) {
            (true, true) => {
                format!("{} slots in {} orders, equal bits", ORDERS[0].len(), ORDERS.len())
            }
            (false, _) => "a slot's bits depend on the order".to_string(),
            (true, false) => "different slots have one digest".to_string(),
        };
        let shown: Vec<Vec<String>> = by_order
            .iter()
            .map(|digests| digests.iter().map(|&digest| hex(digest)).collect())
            .collect();
        Ok((same && told_apart, text, json!({ "digests": shown })))
    }

    /// Times slots, forward and backward, from data on the device to gradients on the device.
    pub fn time(&self, n: u32) -> anyhow::Result<Timed> {
        ensure!(n > 0, "no slots to time");
        let input = self.input(0);
        let mut loss = f64::NAN;
        let mut seconds: Vec<f64> = Vec::new();
        for i in 0..WARM_UP + n {
            self.synchronize();
            let start = Instant::now();
            let (slot_loss, grads) = self.compute(&input);
            self.synchronize();
            if i >= WARM_UP {
                seconds.push(start.elapsed().as_secs_f64());
            }
            drop(grads);
            loss = slot_loss.double_value(&[]);
        }
        seconds.sort_by(f64::total_cmp);
        Ok(Timed {
            min_seconds: seconds[0],
            median_seconds: seconds[seconds.len() / 2],
            max_seconds: seconds[seconds.len() - 1],
            loss,
        })
    }

    /// Makes the images and masks of a slot, from its number alone.
    fn input(&self, slot: u32) -> Input {
        let [height, width] = self.model.img_size.map(i64::from);
        let shape = [i64::from(self.images), i64::from(self.model.channels), height, width];
        let mut word = SEED ^ (u64::from(slot) << 32);
        let mut pixel = || {
            // An additive generator: its high bits fill the range of ±2 evenly.
            word = word.wrapping_add(0x9E37_79B9_7F4A_7C15);
            ((word >> 40) as f32 / (1u32 << 22) as f32) - 2.0
        };
        let pixels: Vec<f32> = (0..shape.iter().product::<i64>()).map(|_| pixel()).collect();
        let n_patches = self.model.n_patches();
        let first = u64::from(slot) * u64::from(self.images);
        let order = |i: u32| MaskOrder::draw(SEED, 0, first + u64::from(i), n_patches).ids_shuffle;
        let ids_shuffle: Vec<u32> = (0..self.images).flat_map(order).collect();
        let masks = Masks::from_shuffle(&ids_shuffle, n_patches, self.model.len_keep());
        Input {
            images_bchw: Tensor::from_slice(&pixels).view(shape).to_device(self.device),
            masks: masks.to_device(self.device),
            weights_b: Tensor::ones([shape[0]], (Kind::Float, self.device)),
        }
    }

    fn compute(&self, input: &Input) -> (Tensor, Vec<Tensor>) {
        let mae = Mae::new(&self.model, &self.tables, &self.weights);
        let loss = mae.loss(&input.images_bchw, &input.masks, &input.weights_b);
        let grads = Tensor::run_backward(&[&loss], self.weights.tensors(), false, false);
        (loss.detach(), grads)
    }

    /// Digests the bits of a slot's loss and of all its gradients.
    fn digest(&self, slot: u32) -> anyhow::Result<u64> {
        let (loss, grads) = self.compute(&self.input(slot));
        let mut sum = Crc64::default();
        for tensor in std::iter::once(&loss).chain(&grads) {
            let values = Vec::<f32>::try_from(tensor.to_device(Device::Cpu).contiguous().view(-1))?;
            ensure!(values.iter().all(|value| value.is_finite()), "a value is not finite");
            sum = sum.then(Crc64::of_f32(&values));
        }
        Ok(sum.value)
    }

    /// Waits until the device has done what it was asked for.
    fn synchronize(&self) {
        if let Device::Cuda(index) = self.device {
            Cuda::synchronize(index as i64);
        }
    }
}
