//! Memory that two members on one machine share: a ring of bytes for each direction.
//!
//! A connection between processes of one machine copies every byte into the kernel and out again,
//! with a system call for each piece. A ring that stays in the cache costs one copy in, one out.
//!
//! The memory is anonymous (a memfd): nothing is left when both ends are gone, however they went.
//! It is sealed against shrinking, so that touching it cannot fail, and its pages are reserved.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use rustix::fs::{FallocateFlags, MemfdFlags, OFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes of a ring: both rings of a link fit the second-level cache, and 28 links of eight members
/// take 28 MiB.
const RING_BYTES: usize = 512 << 10;
/// Where control words are, one page; the rings follow.
const CONTROL_BYTES: usize = 4096;
const MAP_BYTES: usize = CONTROL_BYTES + 2 * RING_BYTES;
/// Control words of one ring, each on a cache line of its own, behind the secret's.
const CONTROL_STRIDE: usize = 512;
const LINE: usize = 64;
/// What nobody may shrink or seal otherwise.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Random bytes at the start of the memory: whoever opens something else notices.
pub(crate) type Secret = [u8; 16];

/// How the other end finds the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Process that holds the memory open.
    pub pid: u32,
    /// Its descriptor.
    pub fd: u32,
    /// What the memory starts with.
    pub secret: Secret,
}

/// One end of two rings.
#[derive(Debug)]
pub(crate) struct Rings {
    base: NonNull<u8>,
    /// The ring that this end writes; it reads the other.
    writes: usize,
}

// SAFETY: the memory belongs to this value until it is dropped, and is shared with another process
// anyway; the two positions of a ring order all access to it.
unsafe impl Send for Rings {}
// SAFETY: as above. Two threads of one end would mix up bytes, not memory; members have one.
unsafe impl Sync for Rings {}

/// Control words of a ring. Positions count bytes from the beginning and never wrap.
struct Control<'a> {
    /// Bytes read.
    head: &'a AtomicU64,
    /// Bytes written.
    tail: &'a AtomicU64,
    /// Whether the reader sleeps until there are bytes.
    reader_sleeps: &'a AtomicU32,
    /// Whether the writer sleeps until there is room.
    writer_sleeps: &'a AtomicU32,
}

impl Rings {
    /// Makes the memory. The descriptor must stay open until the other end has opened it.
    pub fn create(secret: Secret) -> io::Result<(Rings, OwnedFd)> {
        let fd = rustix::fs::memfd_create(
            "lacuna-rings",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        rustix::fs::ftruncate(&fd, MAP_BYTES as u64)?;
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, MAP_BYTES as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SEALS)?;
        let file = File::from(fd);
        file.write_all_at(&secret, 0)?;
        Ok((Rings { base: map(&file)?, writes: 0 }, file.into()))
    }

    /// Opens what another process made.
    ///
    /// # Errors
    /// It is not there, belongs to somebody else, or is not what was made: processes in containers
    /// of their own do not see each other.
    pub fn open(place: &Place) -> io::Result<Rings> {
        let other = || io::Error::new(ErrorKind::InvalidData, "it is not the memory that was made");
        // Looked at before it is opened: on another machine the number may be a terminal's.
        let path = format!("/proc/{}/fd/{}", place.pid, place.fd);
        let flags = OFlags::PATH.bits() as i32;
        let seen = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let found = seen.metadata()?;
        if !found.is_file() || found.len() != MAP_BYTES as u64 {
            return Err(other());
        }
        let path = format!("/proc/self/fd/{}", seen.as_raw_fd());
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| other())?;
        if !seals.contains(SEALS) {
            return Err(other());
        }
        let mut secret: Secret = [0; 16];
        file.read_exact_at(&mut secret, 0)?;
        if secret != place.secret {
            return Err(other());
        }
        Ok(Rings { base: map(&file)?, writes: 1 })
    }

    fn control(&self, ring: usize) -> Control<'_> {
        let at = CONTROL_STRIDE * (ring + 1);
        // SAFETY: the four words lie in the control page, which lives as long as `self`, each at a
        // multiple of its alignment; both processes use them as atomics only.
        unsafe {
            let word = |line: usize| self.base.as_ptr().add(at + line * LINE);
            Control {
                head: AtomicU64::from_ptr(word(0).cast()),
                tail: AtomicU64::from_ptr(word(1).cast()),
                reader_sleeps: AtomicU32::from_ptr(word(2).cast()),
                writer_sleeps: AtomicU32::from_ptr(word(3).cast()),
            }
        }
    }

    fn data(&self, ring: usize) -> *mut u8 {
        // SAFETY: both rings lie in the mapping.
        unsafe { self.base.as_ptr().add(CONTROL_BYTES + ring * RING_BYTES) }
    }

    /// Takes as many of `bytes` as there is room for; returns how many.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let Control { head, tail, .. } = self.control(self.writes);
        let at = tail.load(Ordering::Relaxed);
        let n = bytes.len().min(RING_BYTES - used(head.load(Ordering::Acquire), at)?);
        let (start, first) = cut(at, n);
        // SAFETY: `first` bytes from `start` and `n - first` from the beginning lie in the ring,
        // and the reader leaves them alone until `tail` says that they are there.
        unsafe {
            let data = self.data(self.writes);
            ptr::copy_nonoverlapping(bytes.as_ptr(), data.add(start), first);
            ptr::copy_nonoverlapping(bytes.as_ptr().add(first), data, n - first);
        }
        tail.store(at + n as u64, Ordering::Release);
        Ok(n)
    }

    /// Fills as much of `out` as there are bytes for; returns how many.
    pub fn read(&self, out: &mut [u8]) -> io::Result<usize> {
        let ring = 1 - self.writes;
        let Control { head, tail, .. } = self.control(ring);
        let at = head.load(Ordering::Relaxed);
        let n = out.len().min(used(at, tail.load(Ordering::Acquire))?);
        let (start, first) = cut(at, n);
        // SAFETY: as in `write`; the writer leaves these bytes alone until `head` is past them.
        unsafe {
            let data = self.data(ring);
            ptr::copy_nonoverlapping(data.add(start), out.as_mut_ptr(), first);
            ptr::copy_nonoverlapping(data, out.as_mut_ptr().add(first), n - first);
        }
        head.store(at + n as u64, Ordering::Release);
        Ok(n)
    }

    /// Tells whether the other end sleeps until what this end just wrote, and means it once.
    pub fn wakes_reader(&self) -> bool {
        fence(Ordering::SeqCst);
        let sleeps = self.control(self.writes).reader_sleeps;
        sleeps.load(Ordering::Relaxed) != 0 && sleeps.swap(0, Ordering::Relaxed) != 0
    }

    /// The same for what it just read, which made room.
    pub fn wakes_writer(&self) -> bool {
        fence(Ordering::SeqCst);
        let sleeps = self.control(1 - self.writes).writer_sleeps;
        sleeps.load(Ordering::Relaxed) != 0 && sleeps.swap(0, Ordering::Relaxed) != 0
    }

    /// Asks to be woken when there are bytes to read, or room to write; returns whether this end
    /// may sleep, because there are none yet.
    pub fn may_sleep(&self, to_read: bool, to_write: bool) -> io::Result<bool> {
        let (ours, theirs) = (self.control(self.writes), self.control(1 - self.writes));
        if to_read {
            theirs.reader_sleeps.store(1, Ordering::Relaxed);
        }
        if to_write {
            ours.writer_sleeps.store(1, Ordering::Relaxed);
        }
        // Either this end sees the other's bytes now, or the other sees that this one sleeps.
        fence(Ordering::SeqCst);
        let used_of = |control: &Control<'_>| {
            used(control.head.load(Ordering::Acquire), control.tail.load(Ordering::Acquire))
        };
        let readable = to_read && used_of(&theirs)? > 0;
        let writable = to_write && used_of(&ours)? < RING_BYTES;
        Ok(!readable && !writable)
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), MAP_BYTES) };
        debug_assert!(unmapped.is_ok(), "a whole mapping can be unmapped");
    }
}

fn map(file: impl AsFd) -> io::Result<NonNull<u8>> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at a place of the kernel's choice; the file cannot shrink below it.
    let base =
        unsafe { rustix::mm::mmap(ptr::null_mut(), MAP_BYTES, access, MapFlags::SHARED, file, 0) }?;
    Ok(NonNull::new(base.cast()).expect("mmap returns an address"))
}

/// Bytes in a ring.
fn used(head: u64, tail: u64) -> io::Result<usize> {
    match usize::try_from(tail.wrapping_sub(head)) {
        Ok(n) if n <= RING_BYTES => Ok(n),
        _ => {
            Err(io::Error::new(ErrorKind::InvalidData, "positions in shared memory make no sense"))
        }
    }
}

/// Where `n` bytes from position `at` start in the ring, and how many lie before its end.
fn cut(at: u64, n: usize) -> (usize, usize) {
    let start = (at % RING_BYTES as u64) as usize;
    (start, n.min(RING_BYTES - start))
}

/// Returns how another process of this machine finds memory that this one holds open.
pub(crate) fn place_of(fd: &OwnedFd, secret: Secret) -> Place {
    let fd = u32::try_from(fd.as_raw_fd()).expect("descriptors are not negative");
    Place { pid: std::process::id(), fd, secret }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Both ends, where this system has what they need.
    pub(crate) fn pair() -> Option<(Rings, Rings)> {
        let made = Rings::create([7; 16]).and_then(|(ours, fd)| {
            let theirs = Rings::open(&place_of(&fd, [7; 16]))?;
            Ok((ours, theirs))
        });
        made.map_err(|error| println!("skipped: no shared memory on this system: {error}")).ok()
    }

    /// Pieces of all sizes, many times round, both ways at once.
    #[test]
    fn bytes_come_out_as_they_went_in() {
        let Some((ours, theirs)) = pair() else { return };
        let byte = |i: usize, way: usize| (i.wrapping_mul(2_654_435_761) >> 7) as u8 ^ way as u8;
        const TOTAL: usize = 5 * RING_BYTES + 12_345;
        std::thread::scope(|scope| {
            for (end, way) in [(&ours, 1), (&theirs, 2)] {
                scope.spawn(move || {
                    let (mut sent, mut received, mut size) = (0, 0, 1);
                    let mut buffer = vec![0; 3 * RING_BYTES / 2];
                    while sent < TOTAL || received < TOTAL {
                        size = size * 7 % buffer.len() + 1;
                        let n = size.min(TOTAL - sent);
                        for (i, value) in buffer[..n].iter_mut().enumerate() {
                            *value = byte(sent + i, way);
                        }
                        sent += end.write(&buffer[..n]).unwrap();
                        let n = end.read(&mut buffer[..size]).unwrap();
                        let right = |(i, value)| byte(received + i, 3 - way) == value;
                        assert!(buffer[..n].iter().copied().enumerate().all(right));
                        received += n;
                        std::thread::yield_now();
                    }
                });
            }
        });
    }

    #[test]
    fn sleepers_are_woken_once_and_do_not_sleep_beside_bytes() {
        let Some((ours, theirs)) = pair() else { return };
        assert!(theirs.may_sleep(true, false).unwrap());
        ours.write(b"x").unwrap();
        assert!(ours.wakes_reader() && !ours.wakes_reader());
        assert!(!theirs.may_sleep(true, false).unwrap());
        assert!(!ours.may_sleep(false, true).unwrap(), "there is room");
        let full = vec![0; RING_BYTES];
        assert_eq!(ours.write(&full).unwrap(), RING_BYTES - 1);
        assert_eq!(ours.write(&full).unwrap(), 0);
        assert!(ours.may_sleep(false, true).unwrap());
        theirs.read(&mut [0; 10]).unwrap();
        assert!(theirs.wakes_writer() && !theirs.wakes_writer());
    }

    #[test]
    fn what_was_not_made_here_is_not_opened() {
        if pair().is_none() {
            return;
        }
        let (_ours, fd) = Rings::create([7; 16]).unwrap();
        let place = place_of(&fd, [7; 16]);
        assert!(Rings::open(&Place { secret: [8; 16], ..place }).is_err());
        assert!(Rings::open(&Place { fd: 1_000_000, ..place }).is_err());
        let file = File::from(tempfile());
        file.set_len(MAP_BYTES as u64).unwrap();
        assert!(Rings::open(&place_of(&file.into(), [0; 16])).is_err(), "it can be shrunk");
        let (pipe, _end) = rustix::pipe::pipe().unwrap();
        assert!(Rings::open(&place_of(&pipe, [0; 16])).is_err(), "and a pipe is not waited for");
    }

    fn tempfile() -> OwnedFd {
        rustix::fs::memfd_create("not sealed", MemfdFlags::CLOEXEC).unwrap()
    }

    /// Positions that another process has spoilt are an error, not a wild access.
    #[test]
    fn positions_are_checked() {
        let Some((ours, theirs)) = pair() else { return };
        ours.control(0).tail.store(u64::MAX / 2, Ordering::Relaxed);
        assert_eq!(theirs.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(ours.write(b"x").unwrap_err().kind(), ErrorKind::InvalidData);
    }
}
