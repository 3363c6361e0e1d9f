//! How fast a device multiplies large matrices: what a step's FLOPs are compared with.

use std::time::Instant;

use lacuna_spec::Precision;
use tch::{Device, Kind, Tensor};

use crate::context;

/// Sides of the square matrices. On one core of a CPU a product takes some 30 ms, on a GPU one or
/// two.
const SIDE_CPU: i64 = 1024;
const SIDE_CUDA: i64 = 8192;
/// Products that a device is given at once; each takes 128 or 256 MB.
const IN_A_ROW_CUDA: usize = 10;
/// The fastest of so many products counts: what else the machine does is not the device's fault.
const TRIES: usize = 5;

/// Returns FLOPs a second of large matrix products, a multiply-add counted as two.
pub(super) fn products_per_second(device: Device, precision: Precision) -> f64 {
    let side = if device.is_cuda() { SIDE_CUDA } else { SIDE_CPU };
    let kind = match precision {
        Precision::Bf16 => Kind::BFloat16,
        Precision::F32 | Precision::Tf32 => Kind::Float,
    };
    // Values of all sizes: products of equal ones take less power, and a device is faster then.
    let places = Tensor::arange(side, (Kind::Float, device));
    let values = (places.unsqueeze(1) * 37.0 + places.unsqueeze(0) * 101.0).remainder(251.0);
    let matrix = ((values - 125.0) / 125.0).to_kind(kind);
    // On a device several in a row: being told to begin and being asked for a value take their time
    // too.
    let in_a_row = if device.is_cuda() { IN_A_ROW_CUDA } else { 1 };
    let product = || {
        let began = Instant::now();
        let mut product = matrix.matmul(&matrix);
        for _ in 1..in_a_row {
            product = matrix.matmul(&matrix);
        }
        // Reading a value waits for the device.
        let corner = product.double_value(&[0, 0]);
        assert!(corner.is_finite(), "a product of small numbers");
        began.elapsed().as_secs_f64() / in_a_row as f64
    };
    // The first one loads kernels.
    let fastest = (0..=TRIES).map(|_| product()).skip(1).fold(f64::INFINITY, f64::min);
    drop(matrix);
    if device.is_cuda() {
        // What a run needs beside libtorch, as NCCL's buffers, cannot be taken from its cache.
        context::give_back_memory();
    }
    2.0 * (side as f64).powi(3) / fastest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_has_a_rate() {
        let rate = products_per_second(Device::Cpu, Precision::F32);
        assert!((1e8..1e14).contains(&rate), "{rate:e} FLOPs a second");
    }
}
