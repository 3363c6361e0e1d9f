//! Images of a data set in batches, computed on by several threads and handed over in order.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use lacuna_checkpoint::chain;
use lacuna_data::pack::class_names;
use lacuna_data::{Dataset, ImageShape, SampleError, SampleReader};
use lacuna_mae::context::{self, Kernels};
use lacuna_mae::cuda;
use lacuna_spec::units::grouped;
use lacuna_types::{SampleId, exit};
use lacuna_worker::entry::CodedError;
use tch::Device;

use super::{io, usage};

/// Time between two lines of progress: a log stays readable.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Threads that read images for one device, where nobody says how many.
const THREADS_OF_DEVICE: usize = 4;

/// Finished batches that wait for their turn in each thread's lane.
const AHEAD: usize = 1;

/// How the machine is used; results are the same bits for any number of threads.
#[derive(Args, Debug)]
pub struct ComputeArgs {
    /// Images that are computed together.
    #[arg(long, default_value_t = 64, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Where models compute: `cpu`, `cuda`, or `cuda:1` for another device than the first.
    #[arg(long, default_value = "cpu", value_name = "DEVICE", value_parser = device)]
    device: Device,
    /// Threads that read images, and on the CPU compute [default: the machine's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    threads: Option<u32>,
}

/// What of an image is shown to a model.
#[derive(Args, Clone, Copy, Debug)]
pub struct ViewArgs {
    /// Sides of the centred box that is cut out, as a part of the largest one's: 0.875 for models
    /// that were trained on crops, as the reference's evaluation has it.
    #[arg(long, default_value_t = 1.0, value_name = "PART", value_parser = part)]
    pub crop_pct: f64,
}

fn device(text: &str) -> Result<Device, String> {
    let number = match text.split_once(':') {
        None if text == "cpu" => return Ok(Device::Cpu),
        None if text == "cuda" => Some(0),
        Some(("cuda", number)) => number.parse().ok(),
        _ => None,
    };
    number.map(Device::Cuda).ok_or("expected `cpu`, `cuda` or `cuda:N`".to_string())
}

fn part(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(part) if part > 0.0 && part <= 1.0 => Ok(part),
        _ => Err("expected a number above 0 and at most 1".to_string()),
    }
}

impl ComputeArgs {
    /// Returns the images of a batch.
    pub fn batch(&self) -> usize {
        self.batch as usize
    }

    /// Returns where models compute, ready to be used.
    ///
    /// # Errors
    /// A device that is not there, with the exit code of an unfit machine.
    pub fn device(&self) -> anyhow::Result<Device> {
        let Device::Cuda(number) = self.device else { return Ok(self.device) };
        let unfit = |message: String| CodedError { code: exit::UNFIT, message };
        let library = cuda::load().map_err(|err| unfit(chain(&err)))?;
        let n_devices = library.devices.len();
        if number >= n_devices {
            let text = format!("there is no device cuda:{number}: the driver shows {n_devices}");
            return Err(unfit(text).into());
        }
        // Forward passes alone: what repeats its bits costs time, and asks for settings of cuBLAS.
        let kernels = Kernels { deterministic: false, tf32: false };
        context::set_kernels(kernels).map_err(|err| unfit(chain(&err)))?;
        Ok(self.device)
    }

    /// Returns the number of threads.
    pub fn threads(&self) -> usize {
        let here = || thread::available_parallelism().map_or(1, usize::from);
        // Each holds a batch on the device, which computes one after another.
        let most = if self.device == Device::Cpu { usize::MAX } else { THREADS_OF_DEVICE };
        self.threads.map_or_else(|| here().min(most), |n| n as usize)
    }
}

/// Opens a packed data set.
pub fn open(path: &Path) -> anyhow::Result<Dataset> {
    let opened = Dataset::open(path);
    opened
        .map_err(|error| io(format!("failed to open data `{}`: {}", path.display(), chain(&error))))
}

/// Refuses two data sets whose labels mean other classes.
pub fn same_classes(one: &Path, other: &Path) -> anyhow::Result<()> {
    let (of_one, of_other) = (class_names(one), class_names(other));
    if of_one.is_empty() || of_other.is_empty() {
        return Ok(());
    }
    let n = of_one.len().max(of_other.len());
    let name = |names: &[String], label: usize| {
        names.get(label).map_or("no class".to_string(), |name| format!("`{name}`"))
    };
    match (0..n).find(|label| of_one.get(*label) != of_other.get(*label)) {
        None => Ok(()),
        Some(label) => Err(usage(format!(
            "labels mean other classes: {label} is {} in `{}` and {} in `{}`; pack one of them \
             with the classes of the other (`lacuna data pack --classes`)",
            name(&of_one, label),
            one.display(),
            name(&of_other, label),
            other.display()
        ))),
    }
}

/// Samples of a data set in a given order.
#[derive(Debug)]
pub struct Images<'a> {
    /// Where they are.
    pub dataset: &'a Dataset,
    /// What they become: a centred box, resized.
    pub shape: ImageShape,
    /// Which box that is.
    pub view: ViewArgs,
    /// Which, in this order.
    pub ids: &'a [u64],
    /// How many at a time.
    pub batch: usize,
    /// What is passed over; without it, one that cannot be read ends everything.
    pub unread: Option<Unread<'a>>,
}

/// Images that are passed over: they are black, and their numbers are collected.
#[derive(Clone, Copy, Debug)]
pub struct Unread<'a> {
    /// Their numbers.
    pub ids: &'a Mutex<BTreeSet<u64>>,
    /// Which errors are passed over; another one ends everything.
    pub passes: fn(&SampleError) -> bool,
}

impl Images<'_> {
    /// Computes `work` of every batch's pixels `[b, h, w, c]` with one of `workers` each, and hands
    /// the results over in order. Memory holds a few batches for each worker.
    ///
    /// `take` gets the first sample's place in the order and the result.
    pub fn for_each<W: Send, T: Send>(
        &self,
        what: &str,
        workers: Vec<W>,
        work: impl Fn(&mut W, &[u8]) -> T + Sync,
        mut take: impl FnMut(usize, T) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let n_batches = self.ids.len().div_ceil(self.batch);
        let mut told = Instant::now();
        let workers = workers.into_iter().map(|worker| (worker, SampleReader::default()));
        let compute = |(worker, reader): &mut (W, SampleReader), i: usize| {
            let pixels = self.read(reader, i)?;
            Ok(work(worker, &pixels))
        };
        in_order(workers.collect(), n_batches, compute, |i, result| {
            take(i * self.batch, result)?;
            if told.elapsed() >= LINE_EVERY {
                told = Instant::now();
                let done = ((i + 1) * self.batch).min(self.ids.len());
                let total = grouped(self.ids.len() as u64);
                eprintln!("{what}: {} of {total} images", grouped(done as u64));
            }
            Ok(())
        })
    }

    /// Reads the pixels of batch number `i`.
    fn read(&self, reader: &mut SampleReader, i: usize) -> anyhow::Result<Vec<u8>> {
        let end = self.ids.len().min((i + 1) * self.batch);
        let ids = || self.ids[i * self.batch..end].iter().map(|&id| SampleId(id));
        reader.expect(self.dataset, ids());
        let mut pixels = vec![0u8; ids().len() * self.shape.bytes()];
        for (id, out) in ids().zip(pixels.chunks_exact_mut(self.shape.bytes())) {
            let part = self.view.crop_pct;
            let read = reader.centered(self.dataset, id, part, self.shape, out);
            match (read, self.unread) {
                (Ok(()), _) => {}
                (Err(error), Some(unread)) if (unread.passes)(&error) => {
                    out.fill(0);
                    unread.ids.lock().unwrap_or_else(PoisonError::into_inner).insert(id.0);
                }
                (Err(error), _) => {
                    let hint = "`lacuna data verify` lists all that cannot be used";
                    return Err(io(format!("{}: {hint}", chain(&error))));
                }
            }
        }
        Ok(pixels)
    }
}

/// Computes `work` of `0..n`, spread over a thread for each of `workers`, and hands the results
/// over in order; the first failure ends it.
fn in_order<W: Send, T: Send>(
    workers: Vec<W>,
    n: usize,
    work: impl Fn(&mut W, usize) -> anyhow::Result<T> + Sync,
    mut take: impl FnMut(usize, T) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let n_lanes = workers.len();
    assert!(n_lanes > 0, "at least one worker");
    thread::scope(|scope| {
        let mut lanes: Vec<Receiver<anyhow::Result<T>>> = Vec::new();
        for (lane, mut worker) in workers.into_iter().enumerate() {
            let (send, receive) = sync_channel(AHEAD);
            lanes.push(receive);
            let work = &work;
            scope.spawn(move || {
                for i in (lane..n).step_by(n_lanes) {
                    let result = work(&mut worker, i);
                    let failed = result.is_err();
                    // Nobody listens any more where another one failed.
                    if send.send(result).is_err() || failed {
                        return;
                    }
                }
            });
        }
        for i in 0..n {
            let result = lanes[i % n_lanes].recv().context("a computing thread ended early")?;
            take(i, result?)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    fn compute(text: &str) -> Result<ComputeArgs, String> {
        let device = device(text)?;
        Ok(ComputeArgs { batch: 1, device, threads: None })
    }

    #[test]
    fn devices_are_named_as_elsewhere() {
        assert_eq!(compute("cpu").unwrap().device().unwrap(), Device::Cpu);
        for bad in ["", "gpu", "cuda:", "cuda:x", "cpu:2"] {
            assert!(compute(bad).is_err(), "{bad}");
        }
        if Path::new("/proc/driver/nvidia/version").exists() {
            return println!("skipped: this machine has an NVIDIA driver");
        }
        let none = compute("cuda:1").unwrap().device().unwrap_err();
        assert_eq!(none.downcast_ref::<CodedError>().unwrap().code, exit::UNFIT, "{none}");
    }

    use super::*;

    #[test]
    fn results_come_in_order_for_any_number_of_workers() {
        for n_workers in [1, 2, 3, 7, 40] {
            let mut seen: Vec<(usize, usize)> = Vec::new();
            let workers: Vec<usize> = vec![0; n_workers];
            let work = |count: &mut usize, i: usize| {
                *count += 1;
                Ok(i * i)
            };
            in_order(workers, 23, work, |i, square| {
                seen.push((i, square));
                Ok(())
            })
            .unwrap();
            assert_eq!(seen, (0..23).map(|i| (i, i * i)).collect::<Vec<_>>(), "{n_workers}");
        }
        in_order(vec![()], 0, |_, _| Ok(()), |_, ()| panic!("there is nothing")).unwrap();
    }

    #[test]
    fn the_first_failure_ends_it() {
        let mut taken = 0;
        let work = |_: &mut (), i: usize| match i {
            5 => anyhow::bail!("number five"),
            _ => Ok(i),
        };
        let error = in_order(vec![(), ()], 1000, work, |_, _| {
            taken += 1;
            Ok(())
        });
        assert_eq!((error.unwrap_err().to_string(), taken), ("number five".to_string(), 5));
        let stop =
            |i: usize, _: usize| if i < 3 { Ok(()) } else { anyhow::bail!("the disk is full") };
        let error = in_order(vec![(), ()], 1000, |_: &mut (), i| Ok(i), stop);
        assert_eq!(error.unwrap_err().to_string(), "the disk is full");
    }
}
