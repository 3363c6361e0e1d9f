//! Files and folders of the modelled file system, and what a crash leaves of them.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::path::{Component, Path};
use std::sync::Arc;

/// Unit in which a device writes.
const SECTOR: usize = 512;

/// Files and folders by number; 0 is the root.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(super) nodes: Vec<Node>,
}

#[derive(Clone, Debug)]
pub(super) enum Node {
    File { durable: Arc<Vec<u8>>, now: Arc<Vec<u8>>, pending: Vec<Change> },
    Dir { durable: Names, now: Names, pending: Vec<Change> },
}

pub(super) type Names = BTreeMap<String, usize>;

/// A change that is not durable yet.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Write {
        offset: u64,
        bytes: Arc<[u8]>,
    },
    Len(u64),
    Add(String, usize),
    Remove(String),
    /// Inside one folder, at once.
    Rename(String, String, usize),
}

/// How much of a change survives a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    Nothing,
    All,
    /// The first eighths of a write, in whole sectors.
    Torn(u8),
}

impl Change {
    fn options(&self) -> &'static [Kept] {
        match self {
            Change::Write { bytes, .. } if bytes.len() > SECTOR => {
                &[Kept::Nothing, Kept::All, Kept::Torn(1), Kept::Torn(4), Kept::Torn(7)]
            }
            _ => &[Kept::Nothing, Kept::All],
        }
    }

    fn apply_to_bytes(&self, content: &mut Vec<u8>, kept: Kept) {
        match self {
            Change::Write { offset, bytes } => {
                let n = match kept {
                    Kept::Torn(eighths) => {
                        let part = bytes.len() * usize::from(eighths) / 8;
                        part.next_multiple_of(SECTOR).min(bytes.len())
                    }
                    _ => bytes.len(),
                };
                let end = *offset as usize + n;
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*offset as usize..end].copy_from_slice(&bytes[..n]);
            }
            Change::Len(bytes) => content.resize(*bytes as usize, 0),
            _ => unreachable!("{self:?} is of folders"),
        }
    }

    fn apply_to_names(&self, names: &mut Names) {
        match self {
            Change::Add(name, node) => {
                names.insert(name.clone(), *node);
            }
            Change::Remove(name) => {
                names.remove(name);
            }
            Change::Rename(from, to, node) => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
            _ => unreachable!("{self:?} is of files"),
        }
    }
}

impl World {
    pub(super) fn new() -> Self {
        let (durable, now, pending) = (Names::new(), Names::new(), Vec::new());
        World { nodes: vec![Node::Dir { durable, now, pending }] }
    }

    pub(super) fn names(&self, dir: usize) -> io::Result<&Names> {
        match &self.nodes[dir] {
            Node::Dir { now, .. } => Ok(now),
            Node::File { .. } => Err(ErrorKind::NotADirectory.into()),
        }
    }

    pub(super) fn find(&self, path: &Path) -> io::Result<usize> {
        let mut at = 0;
        for part in path.components() {
            if let Component::Normal(name) = part {
                let names = self.names(at)?;
                let name = name.to_str().ok_or(ErrorKind::InvalidInput)?;
                at = *names.get(name).ok_or(ErrorKind::NotFound)?;
            }
        }
        Ok(at)
    }

    /// Returns the folder that a path's last name lies in, and that name.
    pub(super) fn place(&self, path: &Path) -> io::Result<(usize, String)> {
        let parent = path.parent().ok_or(ErrorKind::InvalidInput)?;
        let name =
            path.file_name().and_then(|name| name.to_str()).ok_or(ErrorKind::InvalidInput)?;
        let dir = self.find(parent)?;
        self.names(dir)?;
        Ok((dir, name.to_string()))
    }

    pub(super) fn change(&mut self, node: usize, change: Change) {
        match &mut self.nodes[node] {
            Node::File { now, pending, .. } => {
                change.apply_to_bytes(Arc::make_mut(now), Kept::All);
                pending.push(change);
            }
            Node::Dir { now, pending, .. } => {
                change.apply_to_names(now);
                pending.push(change);
            }
        }
    }

    pub(super) fn sync(&mut self, node: usize) {
        match &mut self.nodes[node] {
            Node::File { durable, now, pending } => {
                *durable = now.clone();
                pending.clear();
            }
            Node::Dir { durable, now, pending } => {
                durable.clone_from(now);
                pending.clear();
            }
        }
    }

    pub(super) fn add(&mut self, path: &Path, node: Node) -> io::Result<usize> {
        let (dir, name) = self.place(path)?;
        if self.names(dir)?.contains_key(&name) {
            return Err(ErrorKind::AlreadyExists.into());
        }
        self.nodes.push(node);
        let idx = self.nodes.len() - 1;
        self.change(dir, Change::Add(name, idx));
        Ok(idx)
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let node = self.find(from)?;
        let ((dir, name), (to_dir, to_name)) = (self.place(from)?, self.place(to)?);
        if dir == to_dir {
            self.change(dir, Change::Rename(name, to_name, node));
        } else {
            self.change(to_dir, Change::Add(to_name, node));
            self.change(dir, Change::Remove(name));
        }
        Ok(())
    }

    /// Lists the changes that a crash decides about: node and place in its list.
    fn pending(&self) -> Vec<(usize, usize)> {
        let count = |node: &Node| match node {
            Node::File { pending, .. } | Node::Dir { pending, .. } => pending.len(),
        };
        let all = self.nodes.iter().enumerate();
        all.flat_map(|(idx, node)| (0..count(node)).map(move |i| (idx, i))).collect()
    }

    fn pending_change(&self, (node, i): (usize, usize)) -> &Change {
        match &self.nodes[node] {
            Node::File { pending, .. } | Node::Dir { pending, .. } => &pending[i],
        }
    }

    /// Returns what is there after a crash that kept this much of each pending change.
    fn after(&self, changes: &[(usize, usize)], kept: &[Kept]) -> World {
        let mut out = self.clone();
        for node in &mut out.nodes {
            match node {
                Node::File { durable, now, pending } => {
                    (*now, *pending) = (durable.clone(), Vec::new());
                }
                Node::Dir { durable, now, pending } => {
                    (*now, *pending) = (durable.clone(), Vec::new());
                }
            }
        }
        for (&at, &kept) in changes.iter().zip(kept).filter(|(_, kept)| **kept != Kept::Nothing) {
            let change = self.pending_change(at);
            match &mut out.nodes[at.0] {
                Node::File { now, .. } => change.apply_to_bytes(Arc::make_mut(now), kept),
                Node::Dir { now, .. } => change.apply_to_names(now),
            }
        }
        (0..out.nodes.len()).for_each(|node| out.sync(node));
        out
    }

    /// Visits states that a crash now may leave: all of them if they are at most `most`, else that
    /// many drawn by `dice`, with the extremes among them.
    pub fn crashes(&self, most: usize, dice: &mut impl FnMut(usize) -> usize) -> Vec<World> {
        let changes = self.pending();
        let options: Vec<&[Kept]> =
            changes.iter().map(|at| self.pending_change(*at).options()).collect();
        let total = options.iter().try_fold(1usize, |n, of| n.checked_mul(of.len()));
        let state = |kept: &[Kept]| self.after(&changes, kept);
        if let Some(total) = total.filter(|total| *total <= most) {
            let digits = |mut n: usize| -> Vec<Kept> {
                let digit = |of: &&[Kept]| {
                    let kept = of[n % of.len()];
                    n /= of.len();
                    kept
                };
                options.iter().map(digit).collect()
            };
            return (0..total).map(|n| state(&digits(n))).collect();
        }
        let mut out = vec![state(&vec![Kept::Nothing; changes.len()])];
        out.push(state(&vec![Kept::All; changes.len()]));
        while out.len() < most {
            let kept: Vec<Kept> = options.iter().map(|of| of[dice(of.len())]).collect();
            out.push(state(&kept));
        }
        out
    }

    /// Lists all files with their content, by path.
    pub fn files(&self) -> Vec<(String, Arc<Vec<u8>>)> {
        let mut out: Vec<(String, Arc<Vec<u8>>)> = Vec::new();
        let mut open: Vec<(String, usize)> = vec![(String::new(), 0)];
        while let Some((path, node)) = open.pop() {
            match &self.nodes[node] {
                Node::File { now, .. } => out.push((path, now.clone())),
                Node::Dir { now, .. } => {
                    open.extend(now.iter().map(|(name, node)| (format!("{path}/{name}"), *node)));
                }
            }
        }
        out.sort();
        out
    }

    /// Digests everything that can be reached, folders included.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut open: Vec<usize> = vec![0];
        while let Some(node) = open.pop() {
            match &self.nodes[node] {
                Node::File { now, .. } => {
                    hasher.update(&(now.len() as u64).to_le_bytes());
                    hasher.update(now);
                }
                Node::Dir { now, .. } => {
                    for (name, node) in now {
                        hasher.update(name.as_bytes());
                        hasher.update(b"/");
                        open.push(*node);
                    }
                    hasher.update(b"//");
                }
            }
        }
        *hasher.finalize().as_bytes()
    }
}
