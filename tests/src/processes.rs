//! Child processes that never outlive the program that started them.

use std::collections::BTreeSet;
use std::io;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// Process ids of living children, for the thread that ends them on a signal.
static LIVING: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn living() -> MutexGuard<'static, BTreeSet<u32>> {
    LIVING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A child that is killed when dropped, and when this program is asked to end.
#[derive(Debug)]
pub struct Guarded(Child);

impl Guarded {
    /// Starts a command.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        let mut living = living();
        let child = command.spawn()?;
        living.insert(child.id());
        Ok(Guarded(child))
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Returns the child's pipes and handle.
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        send(self.pid(), signal);
    }

    /// Waits for the end, not longer than `limit`.
    pub fn wait(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        if wait_for_end(self.pid(), limit) { self.0.wait().map(Some) } else { Ok(None) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let mut living = living();
        // Both fail only where it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
        living.remove(&self.pid());
    }
}

/// Sends a signal to a process that may have ended.
pub fn send(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // Fails only where it has ended.
        let _ = kill_process(pid, signal);
    }
}

/// Waits until a process has ended, not longer than `limit`; says whether it has.
pub fn wait_for_end(pid: u32, limit: Duration) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let open = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
    // There is no such process: it has ended.
    let Some(Ok(pidfd)) = open else { return true };
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(n) if n > 0 => return true,
            Err(err) if err != Errno::INTR => return false,
            _ if left.is_zero() => return false,
            _ => {}
        }
    }
}

/// Ends all children and then this program on SIGINT and SIGTERM.
pub fn end_children_on_signals() -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let wait = move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let install = |kind| signal(kind).expect("the runtime handles signals");
            let mut term = install(SignalKind::terminate());
            let mut interrupt = install(SignalKind::interrupt());
            tokio::select! {
                _ = term.recv() => {}
                _ = interrupt.recv() => {}
            }
        });
        // Held to the end, so that no child is started after it.
        let living = living();
        for &pid in living.iter() {
            send(pid, Signal::KILL);
        }
        std::process::exit(lacuna_types::exit::INTERRUPTED.into());
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map(|_| ())
}

/// Finds processes with an argument that `wanted` accepts; defunct ones have none.
pub fn find(wanted: impl Fn(&str) -> bool) -> Vec<u32> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir("/proc") else { return found };
    for entry in entries.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        if pid != std::process::id() && line.split('\0').any(&wanted) {
            found.push(pid);
        }
    }
    found
}

/// Returns the nanoseconds that each thread of a process computed, by thread name; the first thread
/// is called `main`.
pub fn thread_times(pid: u32) -> Vec<(String, u64)> {
    let mut times = Vec::new();
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return times };
    for entry in entries.flatten() {
        let read = |name: &str| std::fs::read_to_string(entry.path().join(name));
        let (Ok(name), Ok(stat)) = (read("comm"), read("schedstat")) else { continue };
        let time = stat.split_whitespace().next().and_then(|text| text.parse().ok());
        let main = entry.file_name().to_string_lossy() == pid.to_string();
        let name = if main { "main" } else { name.trim() };
        times.push((name.to_string(), time.unwrap_or(0)));
    }
    times
}
