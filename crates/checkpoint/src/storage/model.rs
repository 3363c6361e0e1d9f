//! A modelled file system for tests: what was synced stays, what was not may or may not.
//!
//! It promises as little as POSIX does. The content of a file is durable after its sync, a name
//! after the sync of its folder, and at a crash any subset of what was done since may be there:
//! writes in part, a file's new name without the loss of the old one, a name without the bytes.

use std::cell::Cell;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

mod world;

pub(crate) use self::world::World;
use self::world::{Change, Names, Node};
use super::posix::{Fs, FsFile};

/// Tells from a call and the one before whether it is left out.
pub(crate) type Broken = fn(&str, &str) -> bool;

/// A modelled file system; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct ModelFs {
    inner: Arc<Mutex<Inner>>,
    turn: Arc<Condvar>,
}

#[derive(Debug)]
struct Inner {
    world: World,
    /// What happened, and how things stood afterwards, if anybody wants to know.
    trace: Vec<Moment>,
    is_traced: bool,
    /// Who may call next, where threads take turns.
    turns: Option<Turns>,
    /// Calls that do nothing and succeed.
    broken: Option<Broken>,
    /// Whether renaming can refuse to replace.
    renames_new: bool,
    /// Calls so far, and the one that fails.
    calls: usize,
    fails: Option<(usize, ErrorKind)>,
}

/// A moment after a call.
#[derive(Clone, Debug)]
pub(crate) struct Moment {
    /// The call, `sync part-00000-of-00003.safetensors.partial`.
    pub call: String,
    /// Files and folders.
    pub world: World,
}

/// Longest wait of a thread for its turn.
const TURN_MAX: Duration = Duration::from_secs(60);

thread_local! {
    /// Which of the threads that take turns this one is.
    static ME: Cell<usize> = const { Cell::new(0) };
}

/// Threads that call one at a time.
#[derive(Debug)]
struct Turns {
    next: usize,
    alive: Vec<usize>,
    dice: u64,
}

impl Turns {
    fn new(n: usize, seed: u64) -> Self {
        let mut turns = Turns { next: 0, alive: (0..n).collect(), dice: seed };
        turns.pass();
        turns
    }

    fn pass(&mut self) {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        if !self.alive.is_empty() {
            self.next = self.alive[(self.dice >> 33) as usize % self.alive.len()];
        }
    }

    fn leave(&mut self, me: usize) {
        self.alive.retain(|one| *one != me);
        self.pass();
    }
}

impl ModelFs {
    /// Makes a file system with one folder, `base`.
    pub fn new(base: &str) -> Self {
        let fs = ModelFs::from(World::new());
        fs.create_dir(Path::new(base)).expect("the root is a folder");
        let mut inner = fs.lock();
        inner.world.sync(0);
        inner.is_traced = true;
        drop(inner);
        fs
    }

    /// Goes on from some state.
    pub fn from(world: World) -> Self {
        let inner = Inner {
            world,
            trace: Vec::new(),
            is_traced: false,
            turns: None,
            broken: None,
            renames_new: true,
            calls: 0,
            fails: None,
        };
        ModelFs { inner: Arc::new(Mutex::new(inner)), turn: Arc::new(Condvar::new()) }
    }

    /// Lets some calls do nothing and succeed.
    pub fn break_calls(&self, broken: Broken) {
        self.lock().broken = Some(broken);
    }

    /// Makes renaming unable to refuse to replace, as some network file systems are.
    pub fn without_rename_new(&self) {
        self.lock().renames_new = false;
    }

    /// Lets the call number `call` from now fail, counting from 0.
    pub fn fail(&self, call: usize, kind: ErrorKind) {
        let mut inner = self.lock();
        inner.fails = Some((inner.calls + call, kind));
    }

    /// Returns what happened so far.
    pub fn trace(&self) -> Vec<Moment> {
        self.lock().trace.clone()
    }

    /// Returns how many changing calls there were.
    pub fn calls(&self) -> usize {
        self.lock().calls
    }

    /// Returns files and folders as a process sees them now.
    pub fn world(&self) -> World {
        self.lock().world.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no test panics in here")
    }

    /// Runs jobs in a thread each; they call one at a time, in an order that `seed` draws.
    pub fn in_turns<T: Send, F>(&self, seed: u64, jobs: Vec<F>) -> Vec<T>
    where
        F: FnOnce() -> T + Send,
    {
        self.lock().turns = Some(Turns::new(jobs.len(), seed));
        let run = |me: usize, job: F| {
            ME.set(me);
            let done = job();
            let mut inner = self.lock();
            inner.turns.as_mut().expect("it was set above").leave(me);
            self.turn.notify_all();
            done
        };
        let done = std::thread::scope(|scope| {
            let jobs = jobs.into_iter().enumerate();
            let threads: Vec<_> = jobs.map(|(me, job)| scope.spawn(move || run(me, job))).collect();
            threads.into_iter().map(|thread| thread.join().expect("a job ends")).collect()
        });
        self.lock().turns = None;
        done
    }

    /// Waits until this thread may call, and passes the turn on.
    fn lock_in_turn(&self) -> MutexGuard<'_, Inner> {
        let not_mine =
            |inner: &mut Inner| inner.turns.as_ref().is_some_and(|turns| turns.next != ME.get());
        let waited = self.turn.wait_timeout_while(self.lock(), TURN_MAX, not_mine);
        let (mut inner, timeout) = waited.expect("no test panics in here");
        assert!(!timeout.timed_out(), "a thread that has its turn makes no call");
        if let Some(turns) = &mut inner.turns {
            turns.pass();
            self.turn.notify_all();
        }
        inner
    }

    /// Does a changing call, unless it is broken or fails.
    fn act<T: Default>(
        &self,
        call: &str,
        path: &Path,
        act: impl FnOnce(&mut World) -> io::Result<T>,
    ) -> io::Result<T> {
        let name = path.file_name().map_or("/".into(), |name| name.to_string_lossy());
        self.act_on(format!("{call} {name}"), act)
    }

    fn act_on<T: Default>(
        &self,
        call: String,
        act: impl FnOnce(&mut World) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut inner = self.lock_in_turn();
        inner.calls += 1;
        if let Some((at, kind)) = inner.fails
            && inner.calls == at + 1
        {
            return Err(kind.into());
        }
        let before = inner.trace.last().map_or("", |moment| &moment.call);
        if inner.broken.is_some_and(|broken| broken(&call, before)) {
            return Ok(T::default());
        }
        let done = act(&mut inner.world)?;
        if inner.is_traced {
            let world = inner.world.clone();
            inner.trace.push(Moment { call, world });
        }
        Ok(done)
    }
}

impl Fs for ModelFs {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn FsFile>> {
        let empty = Arc::new(Vec::new());
        let file = Node::File { durable: empty.clone(), now: empty, pending: Vec::new() };
        let node = self.act("create", path, |world| world.add(path, file))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Box::new(ModelFile { fs: self.clone(), node, name }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn FsFile>> {
        let node = self.lock().world.find(path)?;
        Ok(Box::new(ModelFile { fs: self.clone(), node, name: String::new() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.act("rename", to, |world| world.rename(from, to))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        if !self.lock().renames_new {
            return Err(ErrorKind::Unsupported.into());
        }
        self.act("rename", to, |world| {
            if world.find(to).is_ok() {
                return Err(ErrorKind::AlreadyExists.into());
            }
            world.rename(from, to)
        })
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.act("link", to, |world| {
            let node = world.find(from)?;
            let (dir, name) = world.place(to)?;
            if world.names(dir)?.contains_key(&name) {
                return Err(ErrorKind::AlreadyExists.into());
            }
            world.change(dir, Change::Add(name, node));
            Ok(())
        })
    }

    fn inspect(&self, path: &Path) -> io::Result<(u64, u64)> {
        let inner = self.lock();
        let node = inner.world.find(path)?;
        match &inner.world.nodes[node] {
            // Nothing here asks for a file's links but after a link that found its name taken.
            Node::File { now, .. } => Ok((now.len() as u64, 1)),
            Node::Dir { .. } => Err(ErrorKind::IsADirectory.into()),
        }
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.act("remove", path, |world| {
            world.find(path)?;
            let (dir, name) = world.place(path)?;
            world.change(dir, Change::Remove(name));
            Ok(())
        })
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let (durable, now, pending) = (Names::new(), Names::new(), Vec::new());
        let dir = Node::Dir { durable, now, pending };
        self.act("create_dir", path, |world| world.add(path, dir).map(|_| ()))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.act("remove_dir", path, |world| {
            if !world.names(world.find(path)?)?.is_empty() {
                return Err(ErrorKind::DirectoryNotEmpty.into());
            }
            let (dir, name) = world.place(path)?;
            world.change(dir, Change::Remove(name));
            Ok(())
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.act("sync_dir", path, |world| {
            let node = world.find(path)?;
            world.sync(node);
            Ok(())
        })
    }

    fn list(&self, path: &Path) -> io::Result<Vec<(String, bool)>> {
        let inner = self.lock();
        let names = inner.world.names(inner.world.find(path)?)?;
        let is_dir = |node: &usize| matches!(inner.world.nodes[*node], Node::Dir { .. });
        Ok(names.iter().map(|(name, node)| (name.clone(), is_dir(node))).collect())
    }

    fn free_bytes(&self, _: &Path) -> io::Result<u64> {
        Err(ErrorKind::Unsupported.into())
    }
}

struct ModelFile {
    fs: ModelFs,
    node: usize,
    name: String,
}

impl ModelFile {
    fn change(&self, call: &str, change: Option<Change>) -> io::Result<()> {
        self.fs.act_on(format!("{call} {}", self.name), |world| {
            match change {
                Some(change) => world.change(self.node, change),
                None => world.sync(self.node),
            }
            Ok(())
        })
    }
}

impl FsFile for ModelFile {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change("write", Some(Change::Write { offset, bytes: bytes.into() }))
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.fs.lock();
        let Node::File { now, .. } = &inner.world.nodes[self.node] else {
            return Err(ErrorKind::IsADirectory.into());
        };
        let end = offset as usize + buffer.len();
        let found = now.get(offset as usize..end).ok_or(ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(found);
        Ok(())
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.change("set_len", Some(Change::Len(bytes)))
    }

    fn reserve(&self, bytes: u64) -> io::Result<()> {
        self.change("reserve", Some(Change::Len(bytes)))
    }

    fn sync(&self) -> io::Result<()> {
        self.change("sync", None)
    }

    fn set_direct(&self, _: bool) -> io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }
}
