//! Streams and events: queues that threads work off.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

type Task = Box<dyn FnOnce() + Send>;

/// A queue of work, passed in order by a thread of its own.
pub struct Stream {
    tasks: Mutex<Sender<Task>>,
    progress: Arc<Progress>,
    /// Tasks of the whole device that are not done.
    pending: Arc<AtomicUsize>,
}

#[derive(Default)]
struct Progress {
    enqueued: AtomicU64,
    passed: AtomicU64,
}

impl Stream {
    pub fn new(pending: Arc<AtomicUsize>) -> Self {
        let (tasks, queue): (Sender<Task>, Receiver<Task>) = channel();
        let progress = Arc::new(Progress::default());
        let (passed, done) = (Arc::clone(&progress), Arc::clone(&pending));
        thread::spawn(move || {
            for task in queue {
                task();
                passed.passed.fetch_add(1, Ordering::AcqRel);
                done.fetch_sub(1, Ordering::AcqRel);
            }
        });
        Self { tasks: Mutex::new(tasks), progress, pending }
    }

    pub fn enqueue(&self, task: impl FnOnce() + Send + 'static) {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        self.progress.enqueued.fetch_add(1, Ordering::AcqRel);
        self.pending.fetch_add(1, Ordering::AcqRel);
        tasks.send(Box::new(task)).expect("the thread takes tasks as long as the stream lives");
    }

    pub fn is_idle(&self) -> bool {
        let passed: u64 = self.progress.passed.load(Ordering::Acquire);
        passed == self.progress.enqueued.load(Ordering::Acquire)
    }
}

/// A mark in a stream.
#[derive(Default)]
pub struct Event {
    recorded: AtomicU64,
    done: AtomicU64,
}

impl Event {
    pub fn record(self: &Arc<Self>, stream: &Stream) {
        let number: u64 = self.recorded.fetch_add(1, Ordering::AcqRel) + 1;
        let event = Arc::clone(self);
        stream.enqueue(move || {
            event.done.fetch_max(number, Ordering::AcqRel);
        });
    }

    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire) >= self.recorded.load(Ordering::Acquire)
    }

    /// Makes `stream` wait for the mark as it is now.
    pub fn hold(self: &Arc<Self>, stream: &Stream) {
        let (event, number) = (Arc::clone(self), self.recorded.load(Ordering::Acquire));
        stream.enqueue(move || {
            while event.done.load(Ordering::Acquire) < number {
                thread::sleep(Duration::from_micros(50));
            }
        });
    }
}
