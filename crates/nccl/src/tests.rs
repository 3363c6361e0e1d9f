//! Ranks are threads; the library is the stand-in.

mod deadlines;
mod faults;
mod group;
mod loading;

use std::ffi::c_void;
use std::thread;
use std::time::{Duration, Instant};

use lacuna_cuda::{Device, DeviceBuffer, Driver, Event, PinnedBuffer, Stream};

use crate::{
    CommConfig, Communicator, DataType, Library, NcclError, Progress, ReduceOp, Seat, StartError,
    UniqueId,
};

/// Deadline of what must succeed: long, because test machines are busy.
const PATIENT: Duration = Duration::from_secs(60);

fn library() -> Library {
    Library::open(&lacuna_nccl_standin::path()).expect("the stand-in loads")
}

/// Opens a device; with faults injected on this thread before, they are its first communicator's.
fn device(ordinal: usize) -> Device {
    let driver = Driver::load(Some(&lacuna_nccl_standin::path())).expect("the stand-in loads");
    driver.device(ordinal as u32).expect("it has devices")
}

fn draw(library: &Library) -> UniqueId {
    library.unique_id(Instant::now() + PATIENT, || false).expect("loopback works")
}

/// One rank: a device, a stream, and buffers of both sides.
struct Rank {
    comm: Communicator,
    stream: Stream,
    event: Event,
    host: PinnedBuffer,
    device: DeviceBuffer,
}

impl Rank {
    fn start(
        library: &Library,
        id: &UniqueId,
        world: usize,
        rank: usize,
    ) -> Result<Self, NcclError> {
        Self::start_with(library, Seat { id: *id, world, rank }, CommConfig::default())
    }

    fn start_with(library: &Library, seat: Seat, config: CommConfig) -> Result<Self, NcclError> {
        Self::start_on(seat.rank, library, seat, config)
    }

    fn start_on(
        ordinal: usize,
        library: &Library,
        seat: Seat,
        config: CommConfig,
    ) -> Result<Self, NcclError> {
        let device: Device = device(ordinal);
        let there = device.clone();
        let enter = move || there.make_current();
        let started =
            Communicator::start(library, seat, config, enter, Instant::now() + PATIENT, || false);
        let (comm, ()) = started.map_err(|error| match error {
            StartError::Nccl(error) => error,
            StartError::Enter(error) => panic!("the device works: {error}"),
        })?;
        device.make_current().expect("the device works");
        Ok(Self {
            comm,
            stream: Stream::new(&device).expect("the device works"),
            event: Event::new(&device).expect("the device works"),
            host: PinnedBuffer::new(&device, 1 << 12).expect("the device works"),
            device: DeviceBuffer::new(&device, 1 << 12).expect("the device works"),
        })
    }

    fn ready(self) -> Result<Self, NcclError> {
        self.comm.wait(Instant::now() + PATIENT, || false)?;
        Ok(self)
    }

    fn at(&self, byte: usize) -> *mut c_void {
        assert!(byte <= self.device.n_bytes(), "inside the buffer");
        self.device.as_ptr().wrapping_byte_add(byte)
    }

    fn raw(&self) -> *mut c_void {
        self.stream.as_raw()
    }

    /// Puts bytes on the device.
    fn put(&mut self, bytes: &[u8]) {
        self.host.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: the buffers live as long as this rank, which waits before it uses them again.
        unsafe { self.device.load(&self.host, bytes.len(), &self.stream) }.expect("it works");
        self.pass();
    }

    /// Waits for the operations enqueued, and gets bytes back.
    fn get(&mut self, n_bytes: usize) -> Vec<u8> {
        self.comm.wait(Instant::now() + PATIENT, || false).expect("nothing fails");
        // SAFETY: as above.
        unsafe { self.device.store(&mut self.host, n_bytes, &self.stream) }.expect("it works");
        self.pass();
        self.host.bytes()[..n_bytes].to_vec()
    }

    fn pass(&self) {
        self.event.record(&self.stream).expect("the device works");
        until("the stream has passed the mark", || self.event.is_done().expect("it works"));
    }
}

/// Starts a sum of one element.
fn sum(me: &Rank) -> Result<Progress, NcclError> {
    let (at, raw) = (me.at(0), me.raw());
    // SAFETY: the buffer holds one element, and lives as long as `me`, which the tests keep until
    // the sum has passed or the abort has returned.
    unsafe { me.comm.all_reduce(at, at, 1, DataType::I64, ReduceOp::Sum, raw) }
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::yield_now();
    }
}

/// Runs `work` for each rank of a new group, each in its own thread; results in rank order.
fn on_each<T: Send>(world: usize, work: impl Fn(&Library, &UniqueId, usize) -> T + Sync) -> Vec<T> {
    let library = library();
    let id = draw(&library);
    let (library, id, work) = (&library, &id, &work);
    thread::scope(|scope| {
        let threads: Vec<_> =
            (0..world).map(|rank| scope.spawn(move || work(library, id, rank))).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, T>| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        threads.into_iter().map(join).collect()
    })
}
