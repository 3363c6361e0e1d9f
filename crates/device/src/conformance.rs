//! What kernels must do, on whatever they run: the bits of `recipe`. Panics where they do not.

use std::ops::Range;
use std::sync::Arc;

use lacuna_cuda::{DeviceBuffer, Grid, PinnedBuffer, Stream};
use lacuna_recipe::adamw::{self, AdamW};
use lacuna_recipe::digest::Crc64;
use lacuna_recipe::model::{Init, ParamSpec};
use lacuna_recipe::reduce::{ControlWord, Reducer, Request, SlotGrad, Verdict};
use lacuna_recipe::state::{Layout, Section};
use lacuna_recipe::step::Normalize;

use crate::wait::drain;
use crate::{Aside, DeviceState, Kernels, Pixels, Shape, Updating};

const SLOTS: u32 = 4;
/// Grids that all launches are tried with besides their own: threads that take many elements each,
/// in one block and in several, and numbers of them that divide nothing.
const GRIDS: [Grid; 4] = [
    Grid { blocks: 1, threads: 1 },
    Grid { blocks: 3, threads: 1 },
    Grid { blocks: 2, threads: 32 },
    Grid { blocks: 5, threads: 7 },
];
/// Why nothing here may fail.
const WORKS: &str = "the device works";
const FITS: &str = "a small state fits";

/// Runs every check on a device, with several numbers of threads.
///
/// # Panics
/// If a bit differs, or a call fails.
pub fn run(kernels: &Kernels) {
    what_was_set_aside_stays(kernels);
    let mut norms = Vec::new();
    for grid in [None].into_iter().chain(GRIDS.map(Some)) {
        let kernels = &kernels.with_grid(grid);
        norms.push(a_step_on_the_device_has_the_bits_of_the_host(kernels));
        overflow_and_infinity_raise_the_lanes_of_the_host(kernels);
        threads_that_raise_flags_leave_those_of_others(kernels);
        bytes_become_the_values_of_the_recipe(kernels);
    }
    // The host sums squares in another order; the device has one.
    assert!(norms.iter().all(|of_grid| *of_grid == norms[0]), "norms: {norms:?}");
}

/// Copies are those of their time, whatever becomes of the state, and are read in any thread.
fn what_was_set_aside_stays(kernels: &Kernels) {
    let layout = layout();
    let n = layout.numel();
    let mut state = DeviceState::new(kernels, layout, SLOTS).expect(FITS);
    let parts = [
        (Section::Param, 0..n),
        (Section::ExpAvgSq, 3..n - 1),
        (Section::ExpAvg, 5..5),
        (Section::Param, 7..8),
    ];
    let mut kept = Vec::new();
    for time in 1..5 {
        for section in Section::ALL {
            let values = noise(time * 10 + section as u64, n, 1.0);
            state.write(section, 0, &values).expect(WORKS);
        }
        let aside = state.set_aside(&parts).expect(WORKS);
        // The first is read at once and its memory is used again, the others wait.
        if time == 1 {
            check_aside(aside, time, &parts);
        } else {
            kept.push((time, aside));
        }
    }
    let read = move || {
        for (time, aside) in kept.into_iter().rev() {
            check_aside(aside, time, &parts);
        }
    };
    std::thread::spawn(read).join().expect("copies are as they were");
}

/// Compares a copy with what was written at that time.
fn check_aside(mut aside: Aside, time: u64, parts: &[(Section, Range<usize>)]) {
    for (i, (section, range)) in parts.iter().enumerate() {
        let mut bytes = vec![0; range.len() * 4];
        aside.read(i, &mut bytes).expect(WORKS);
        let wanted = noise(time * 10 + *section as u64, range.end, 1.0);
        assert_eq!(bytes, bytemuck::cast_slice(&wanted[range.clone()]), "part {i} at {time}");
    }
}

/// Tensors whose sizes meet pieces of digests in all ways; one is decayed, others are not.
fn layout() -> Arc<Layout> {
    let param = |name: &str, shape: Vec<usize>| ParamSpec {
        name: name.into(),
        shape,
        init: Init::Normal02,
    };
    Layout::new(vec![
        param("a.bias", vec![7]),
        param("a.weight", vec![64, 33]),
        param("b.weight", vec![1024, 3]),
        param("cls_token", vec![1, 1, 5]),
    ])
}

/// Values of many magnitudes.
fn noise(seed: u64, n: usize, scale: f32) -> Vec<f32> {
    let mut word: u64 = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            let exponent = (word & 15) as i32 - 8;
            ((word >> 40) as f32 / 8_388_608.0 - 1.0) * scale * 2f32.powi(exponent)
        })
        .collect()
}

/// Adds a slot's gradient on both sides.
fn add(state: &mut DeviceState, reducer: &mut Reducer, slot: u32, change: impl Fn(&mut [f32])) {
    let (layout, device) = (state.layout().clone(), state.device().clone());
    let stream = Stream::legacy(&device);
    for block in 0..layout.n_blocks() {
        let n: usize = layout.range(block).len();
        let mut values = noise(u64::from(slot) * 100 + block as u64, n, 1e-3);
        change(&mut values);
        let mut host = PinnedBuffer::new(&device, n * 4).expect(WORKS);
        let mut there = DeviceBuffer::new(&device, n * 4).expect(WORKS);
        host.bytes_mut()[..n * 4].copy_from_slice(bytemuck::cast_slice(&values));
        // SAFETY: freeing a buffer waits for the stream.
        unsafe {
            there.load(&host, n * 4, &stream).expect(WORKS);
            state.add(block, there.as_ptr() as u64).expect(WORKS);
        }
        reducer.add(SlotGrad { block, values: &values });
    }
    reducer.end_slot(slot, 0.25 + slot as f32);
}

fn word() -> ControlWord {
    let mut word = ControlWord::new(SLOTS);
    (0..SLOTS).for_each(|slot| word.end_slot(slot, 0.25 + slot as f32));
    word
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Returns the bits of the norms.
fn a_step_on_the_device_has_the_bits_of_the_host(kernels: &Kernels) -> Vec<u64> {
    let grid = kernels.grid;
    let mut norms = Vec::new();
    let layout = layout();
    let n: usize = layout.numel();
    let mut state = DeviceState::new(kernels, layout.clone(), SLOTS).expect(FITS);
    let mut host: [Vec<f32>; 3] = [noise(1, n, 0.1), noise(2, n, 1e-3), vec![0.0; n]];
    for (section, values) in Section::ALL.into_iter().zip(&host) {
        state.write(section, 0, values).expect(WORKS);
    }
    let mut reducer = Reducer::new(layout.clone(), SLOTS);
    let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.05 };
    for t in 1..=3 {
        let exponents: Vec<i32> = (0..layout.n_blocks()).map(|block| 28 + block as i32).collect();
        state.begin(&exponents).expect(WORKS);
        reducer.begin(&exponents);
        (0..SLOTS).for_each(|slot| add(&mut state, &mut reducer, slot, |_| {}));
        reducer.raise(Request::Stop, 5);
        let mut ours = word();
        ours.raise(Request::Stop, 5);
        state.close(&mut ours).expect(WORKS);
        let mut mean = vec![0f32; n];
        let verdict = reducer.finish(1, &mut mean).expect(WORKS);
        let Verdict::Apply(expected) = verdict else { panic!("{verdict:?}") };
        let reading = state.word().expect(WORKS).read(1).expect(WORKS);
        assert_eq!(reading.verdict(), None);
        let (norm, max_abs) = state.mean().expect(WORKS);
        norms.push(norm.to_bits());
        assert!((norm / expected.grad_norm - 1.0).abs() < 1e-12, "{norm}, {grid:?}");
        assert_eq!(reading.summary(expected.grad_norm, max_abs), expected, "{grid:?}");
        assert!(expected.stop);

        let updating = Updating { adamw: &adamw, lr: 1e-3, t, decay_tokens: true };
        state.apply(&updating).expect(WORKS);
        let [param, exp_avg, exp_avg_sq] = &mut host;
        for (block, spec) in layout.params().iter().enumerate() {
            let range = layout.range(block);
            adamw::apply_f32(
                &adamw.update_f32(1e-3, t, spec.decays(true)),
                &mut param[range.clone()],
                &mut exp_avg[range.clone()],
                &mut exp_avg_sq[range.clone()],
                &mean[range],
            );
        }
        for (section, values) in Section::ALL.into_iter().zip(&host) {
            let mut read = vec![0f32; n];
            state.read(section, 0..n, &mut read).expect(WORKS);
            assert!(bits(&read) == bits(values), "{section:?} after update {t}, {grid:?}");
        }
    }
    let digests = state.tensor_digests().expect(WORKS);
    for (block, digests) in digests.iter().enumerate() {
        for (digest, values) in digests.iter().zip(&host) {
            let want = Crc64::of_f32(&values[layout.range(block)]);
            assert_eq!(*digest, want, "tensor {block}, {grid:?}");
        }
    }
    norms
}

fn overflow_and_infinity_raise_the_lanes_of_the_host(kernels: &Kernels) {
    let layout = layout();
    let is_redo = |verdict: &Verdict| *verdict == Verdict::Redo;
    let cases = [(1e30, true), (f32::INFINITY, false), (f32::NAN, false)];
    let mut state = DeviceState::new(kernels, layout.clone(), SLOTS).expect(FITS);
    for (value, redone) in cases {
        let mut reducer = Reducer::new(layout.clone(), SLOTS);
        let exponents = vec![30; layout.n_blocks()];
        state.begin(&exponents).expect(WORKS);
        reducer.begin(&exponents);
        let spoil = |slot: u32| {
            move |values: &mut [f32]| {
                if slot == 2 {
                    values[3] = value;
                }
            }
        };
        (0..SLOTS).for_each(|slot| add(&mut state, &mut reducer, slot, spoil(slot)));
        let mut ours = word();
        state.close(&mut ours).expect(WORKS);
        let verdict = reducer.finish(1, &mut vec![0.0; layout.numel()]).expect(WORKS);
        let skipped = matches!(verdict, Verdict::Skip(_));
        assert_eq!((is_redo(&verdict), skipped), (redone, !redone), "{value}: {verdict:?}");
        assert_eq!(state.word().expect(WORKS).read(1).expect(WORKS).verdict(), Some(verdict));
    }
}

/// Both flags are of one word, to which several threads add what they found.
fn threads_that_raise_flags_leave_those_of_others(kernels: &Kernels) {
    let layout = layout();
    let mut state = DeviceState::new(kernels, layout.clone(), SLOTS).expect(FITS);
    for [first, second] in [[1e30, f32::NAN], [f32::NAN, 1e30]] {
        let mut reducer = Reducer::new(layout.clone(), SLOTS);
        let exponents = vec![30; layout.n_blocks()];
        state.begin(&exponents).expect(WORKS);
        reducer.begin(&exponents);
        add(&mut state, &mut reducer, 0, |values| {
            (values[0], values[4]) = (first, second);
        });
        state.close(&mut word()).expect(WORKS);
        let reading = state.word().expect(WORKS).read(1).expect(WORKS);
        assert!(reading.overflow && reading.non_finite, "{reading:?}, {:?}", kernels.grid);
    }
}

fn bytes_become_the_values_of_the_recipe(kernels: &Kernels) {
    let shape = Shape { images: 3, plane: 20, channels: 3 };
    let normalize = Normalize::new(&[0.48, 0.45, 0.4], &[0.22, 0.23, 0.25]);
    let mut pixels = Pixels::new(kernels, normalize.tables(), shape).expect(WORKS);
    let n: usize = shape.n_values();
    let mut back = PinnedBuffer::new(&kernels.device, n * 4).expect(WORKS);
    let stream = Stream::legacy(&kernels.device);
    for salt in 0..3 {
        let bytes: Vec<u8> = (0..n).map(|idx| (idx * 37 + salt * 101) as u8).collect();
        pixels.load(&bytes).expect(WORKS);
        let mut expected = vec![0f32; n];
        normalize.apply(&bytes, shape.plane, &mut expected);
        // SAFETY: the wait below ends before `back` is read.
        unsafe { pixels.values.store(&mut back, n * 4, &stream) }.expect(WORKS);
        drain(&pixels.copied, &stream, "copy values").expect(WORKS);
        let (got, want) = (back.bytes(), bytemuck::cast_slice::<f32, u8>(&expected));
        assert_eq!(got, want, "slot {salt}, {:?}", kernels.grid);
    }
}
