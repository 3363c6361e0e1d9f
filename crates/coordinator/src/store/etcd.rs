//! State that several coordinators share: in etcd, with SQLite as what it is read from here.
//!
//! Whoever leads writes to etcd first, in transactions that fail once it leads no longer, and then
//! to a file of its own; whoever takes over makes that file anew from etcd. So etcd is the truth,
//! and everything that reads a coordinator's state reads SQLite, as it does without etcd.
//!
//! | key | value |
//! |---|---|
//! | `<prefix>/state/epoch` | number of starts |
//! | `<prefix>/state/runs/<run>` | spec, size and fingerprint of the data |
//! | `<prefix>/state/log/<run>/<n>` | facts of the journal, written together |
//! | `<prefix>/state/told/<run>/<n>` | updates for people; the newest 20,000 of a run |
//! | `<prefix>/state/pictures/<run>/<step>/<place>/<sample>` | a picture, PNG |
//! | `<prefix>/state/bans/<node>` | a machine that is kept out |

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use lacuna_control::journal::Record;
use lacuna_track::Figures;
use lacuna_types::{CoordEpoch, RunId};
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{
    Ban, Batch, Elsewhere, Entry, JournalLine, Part, PicturePlace, SqliteStore, Store, StoreError,
    StoredRun, Ticket, Update, now_ms, text,
};
use crate::etcd::{BYTES_MAX, Change, Etcd, EtcdError, Leadership, OPS_MAX, OwnThread, Pair};

/// How long a write may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long the reading of the whole state may take: each of its pages has a deadline of its own.
const READ_DEADLINE: Duration = Duration::from_secs(600);
/// Keys of updates that stay of a run.
const TOLD_KEPT: u64 = 20_000;
/// So many are deleted at a time.
const TOLD_CUT: u64 = 1000;
/// Largest picture that is kept: a transaction has room for it.
const PICTURE_BYTES_MAX: usize = BYTES_MAX - (64 << 10);
/// Most changes of a batch that are not an entry of it.
const CHANGES_MORE: usize = 3;

/// A store whose truth is in etcd.
#[derive(Debug)]
pub struct EtcdStore {
    inner: SqliteStore,
    etcd: Etcd,
    /// Calls of etcd run here: those of the store come from threads with a runtime and without.
    thread: OwnThread,
    prefix: String,
    lead: Leadership,
    ends: BTreeMap<RunId, Ends>,
}

/// The keys of a run.
#[derive(Clone, Debug, Default)]
struct Ends {
    /// Newest numbers of its keys.
    log: u64,
    told: u64,
    /// Pictures that etcd has.
    pictures: BTreeSet<PicturePlace>,
}

#[derive(Serialize, Deserialize)]
struct RunValue {
    spec: String,
    n_samples: u64,
    fingerprint: String,
}

#[derive(Serialize, Deserialize)]
struct Facts {
    at_ms: u64,
    epoch: u64,
    facts: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Told {
    /// Number of the first one.
    first: u64,
    updates: Vec<Update>,
}

#[derive(Serialize, Deserialize)]
struct BanValue {
    until_ms: u64,
    why: String,
}

impl EtcdStore {
    /// Reads the state from etcd into a new file at `path`, which nobody else may have open.
    pub(crate) fn open(
        path: &Path,
        etcd: Etcd,
        prefix: &str,
        lead: Leadership,
    ) -> Result<Self, StoreError> {
        let thread = OwnThread::start("etcd")?;
        for suffix in ["", "-wal", "-shm"] {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            // What cannot be removed is found below, where the file is opened.
            let _ = std::fs::remove_file(name);
        }
        let mut inner = SqliteStore::open(path)?;
        inner.is_a_copy()?;
        let prefix = format!("{}/state", prefix.trim_end_matches('/'));
        let (etcd, ends) = (etcd.on(&thread)?, BTreeMap::new());
        let mut store = EtcdStore { inner, etcd, thread, prefix, lead, ends };
        let (etcd, range) = (store.etcd.clone(), format!("{}/", store.prefix));
        let pairs = store.call_within(READ_DEADLINE, async move { etcd.all(&range).await })()?;
        store.fill(pairs)?;
        Ok(store)
    }

    /// Begins a call of etcd; what comes back waits for it, on whatever kind of thread.
    fn call<T, F>(&self, call: F) -> impl FnOnce() -> Result<T, StoreError> + Send + use<T, F>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, EtcdError>> + Send + 'static,
    {
        self.call_within(DEADLINE, call)
    }

    /// The same, for as long as is given.
    fn call_within<T, F>(
        &self,
        deadline: Duration,
        call: F,
    ) -> impl FnOnce() -> Result<T, StoreError> + Send + use<T, F>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, EtcdError>> + Send + 'static,
    {
        let (done, answer) = mpsc::sync_channel(1);
        self.thread.handle().spawn(async move {
            // Nobody waits any more where this fails.
            let _ = done.send(call.await);
        });
        let late = move |_| EtcdError::Call {
            what: "answer",
            why: format!("no answer within {} s", deadline.as_secs()),
        };
        move || Ok(answer.recv_timeout(deadline).map_err(late)??)
    }

    /// Begins changes; what comes back waits for them.
    fn changing(&self, changes: Vec<Change>) -> Elsewhere {
        let (etcd, lead) = (self.etcd.clone(), self.lead.clone());
        Box::new(self.call(async move { etcd.change_in_time(&lead, &changes).await }))
    }

    fn change(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        self.changing(changes)()
    }

    /// Takes everything over that etcd has.
    fn fill(&mut self, mut pairs: Vec<Pair>) -> Result<(), StoreError> {
        let prefix = format!("{}/", self.prefix);
        // Runs first, the oldest first; what is of a run is in order of its key.
        pairs.sort_by_key(|pair| (!pair.key.contains("/runs/"), pair.created));
        for Pair { key, value, .. } in pairs {
            let Some(name) = key.strip_prefix(&prefix) else { continue };
            let mut words = name.splitn(2, '/');
            let (kind, rest) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            match kind {
                "runs" => {
                    let RunValue { spec, n_samples, fingerprint } = parsed(&key, &value)?;
                    let saved = Default::default();
                    let run_id = run_of(&key, rest)?;
                    self.inner.put_run(&StoredRun {
                        run_id,
                        spec,
                        n_samples,
                        fingerprint,
                        saved,
                    })?;
                }
                "bans" => {
                    let BanValue { until_ms, why } = parsed(&key, &value)?;
                    self.inner.put_ban(&Ban { node: rest.to_string(), until_ms, why })?;
                }
                "log" | "told" | "pictures" => self.fill_run(&key, kind, rest, &value)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn fill_run(
        &mut self,
        key: &str,
        kind: &str,
        rest: &str,
        value: &[u8],
    ) -> Result<(), StoreError> {
        let strange = || content(key, "it is not a key of a run");
        let (run, number) = rest.split_once('/').ok_or_else(strange)?;
        let run = run_of(key, run)?;
        let ends = self.ends.entry(run.clone()).or_default();
        match kind {
            "log" => {
                ends.log = ends.log.max(number.parse().map_err(|_| strange())?);
                let Facts { at_ms, epoch, facts } = parsed(key, value)?;
                let records = facts.iter().map(|fact| text::parse(fact));
                let records: Vec<Record> =
                    records.collect::<Result<_, _>>().map_err(|why| content(key, &why))?;
                let entries = records.into_iter().map(Entry::Fact).collect();
                self.inner.write_at(&[Batch { run, entries }], at_ms, CoordEpoch(epoch))?;
            }
            "told" => {
                ends.told = ends.told.max(number.parse().map_err(|_| strange())?);
                let Told { first, updates } = parsed(key, value)?;
                self.inner.restore_updates(&run, first, &updates)?;
            }
            _ => {
                let numbers: Vec<u64> = number.split('/').filter_map(|n| n.parse().ok()).collect();
                let [step, index, sample] = numbers[..] else { return Err(strange()) };
                let index = u32::try_from(index).map_err(|_| strange())?;
                let place = PicturePlace { step, index, sample };
                ends.pictures.insert(place);
                self.inner.restore_picture(&run, place, value)?;
            }
        }
        Ok(())
    }

    /// Returns what a batch changes in etcd. `told` is the number of the run's newest update.
    fn changes_of(&mut self, batch: &Batch, at_ms: u64, told: &mut u64) -> Vec<Change> {
        let Batch { run, entries } = batch;
        let (mut facts, mut updates, mut changes) = (Vec::new(), Vec::new(), Vec::new());
        let ends = self.ends.entry(run.clone()).or_default();
        for entry in entries {
            match entry {
                Entry::Fact(record) => facts.push(text::render(record)),
                Entry::Update(update) => updates.push(update.clone()),
                Entry::Picture(update, png) => {
                    updates.push(update.clone());
                    let Update::Picture { place, .. } = update else { continue };
                    ends.pictures.insert(*place);
                    let key = picture_key(&self.prefix, run, *place);
                    changes.push(Change::put(key, png.clone()));
                }
            }
        }
        if !facts.is_empty() {
            ends.log += 1;
            let value = Facts { at_ms, epoch: self.inner.epoch.0, facts };
            let key = format!("{}/log/{run}/{:020}", self.prefix, ends.log);
            changes.push(Change::put(key, json(&value)));
        }
        if !updates.is_empty() {
            ends.told += 1;
            let first = *told + 1;
            *told += updates.len() as u64;
            let key = |n: u64| format!("{}/told/{run}/{n:020}", self.prefix);
            changes.push(Change::put(key(ends.told), json(&Told { first, updates })));
            if ends.told > TOLD_KEPT && ends.told.is_multiple_of(TOLD_CUT) {
                changes.push(Change::Delete { from: key(0), to: key(ends.told - TOLD_KEPT) });
            }
        }
        changes
    }

    /// Forgets pictures in etcd that are no longer kept here.
    fn forget_pictures(&mut self, run: &RunId) -> Result<(), StoreError> {
        let kept: BTreeSet<PicturePlace> = self.inner.pictures(run)?.into_iter().collect();
        let Some(ends) = self.ends.get_mut(run) else { return Ok(()) };
        let gone: Vec<PicturePlace> = ends.pictures.difference(&kept).copied().collect();
        ends.pictures = kept;
        let delete = |place: &PicturePlace| {
            let from = picture_key(&self.prefix, run, *place);
            Change::Delete { to: format!("{from}\0"), from }
        };
        let changes: Vec<Change> = gone.iter().map(delete).collect();
        changes.chunks(OPS_MAX).try_for_each(|some| self.change(some.to_vec()))
    }
}

impl Store for EtcdStore {
    fn next_epoch(&mut self) -> Result<CoordEpoch, StoreError> {
        let key = format!("{}/epoch", self.prefix);
        let (etcd, asked) = (self.etcd.clone(), key.clone());
        let before = self.call(async move { etcd.get(&asked).await })()?;
        let before: u64 = before.map_or(Ok(0), |value| parsed(&key, &value))?;
        self.change(vec![Change::put(key, json(&(before + 1)))])?;
        self.inner.epoch = CoordEpoch(before + 1);
        Ok(self.inner.epoch)
    }

    fn runs(&self) -> Result<Vec<StoredRun>, StoreError> {
        self.inner.runs()
    }

    fn put_run(&mut self, run: &StoredRun) -> Result<(), StoreError> {
        let value = RunValue {
            spec: run.spec.clone(),
            n_samples: run.n_samples,
            fingerprint: run.fingerprint.clone(),
        };
        let key = format!("{}/runs/{}", self.prefix, run.run_id);
        self.change(vec![Change::put(key, json(&value))])?;
        self.inner.put_run(run)
    }

    /// Fills a transaction.
    fn prepare(&mut self, batches: &[Batch]) -> Result<Part, StoreError> {
        let (at_ms, mut some, mut changes, mut bytes) = (now_ms(), Vec::new(), Vec::new(), 0);
        let mut told: BTreeMap<RunId, u64> = BTreeMap::new();
        let mut here: BTreeSet<(RunId, PicturePlace)> = BTreeSet::new();
        for batch in batches {
            let batch = self.with_new_pictures(batch, &mut here)?;
            let size: usize = batch.entries.iter().map(size_of).sum();
            let n_changes = changes.len() + batch.entries.len() + CHANGES_MORE;
            if (n_changes > OPS_MAX || bytes + size > BYTES_MAX) && !some.is_empty() {
                break;
            }
            let last = match told.get(&batch.run) {
                Some(last) => *last,
                None => self.inner.last_seq(&batch.run)?,
            };
            let last = told.entry(batch.run.clone()).or_insert(last);
            changes.extend(self.changes_of(&batch, at_ms, last));
            bytes += size;
            some.push(batch);
        }
        let n = some.len();
        let elsewhere = (!changes.is_empty()).then(|| self.changing(changes));
        Ok(Part { n, elsewhere, ticket: Some(Ticket { at_ms, batches: some }) })
    }

    fn finish(
        &mut self,
        batches: &[Batch],
        ticket: Option<Ticket>,
    ) -> Result<Vec<Vec<u64>>, StoreError> {
        let Some(Ticket { at_ms, batches }) = ticket else { return self.write(batches) };
        let written = self.inner.write_at(&batches, at_ms, self.inner.epoch)?;
        for batch in batches.iter().filter(|batch| batch.entries.iter().any(is_picture)) {
            self.forget_pictures(&batch.run)?;
        }
        Ok(written)
    }

    fn write(&mut self, batches: &[Batch]) -> Result<Vec<Vec<u64>>, StoreError> {
        let mut written = Vec::with_capacity(batches.len());
        let mut rest = batches;
        while !rest.is_empty() {
            let part = self.prepare(rest)?;
            part.elsewhere.map_or(Ok(()), |keep| keep())?;
            let (now, later) = rest.split_at(part.n);
            written.extend(self.finish(now, part.ticket)?);
            rest = later;
        }
        Ok(written)
    }

    fn journal(&self, run: &RunId) -> Result<Vec<JournalLine>, StoreError> {
        self.inner.journal(run)
    }

    fn updates(
        &self,
        run: &RunId,
        after: u64,
        limit: u64,
    ) -> Result<Vec<(u64, Update)>, StoreError> {
        self.inner.updates(run, after, limit)
    }

    fn last_seq(&self, run: &RunId) -> Result<u64, StoreError> {
        self.inner.last_seq(run)
    }

    fn newest_figures(&self, run: &RunId) -> Result<Option<Figures>, StoreError> {
        self.inner.newest_figures(run)
    }

    fn put_ban(&mut self, ban: &Ban) -> Result<(), StoreError> {
        let value = BanValue { until_ms: ban.until_ms, why: ban.why.clone() };
        let key = format!("{}/bans/{}", self.prefix, ban.node);
        self.change(vec![Change::put(key, json(&value))])?;
        self.inner.put_ban(ban)
    }

    fn bans(&self) -> Result<Vec<Ban>, StoreError> {
        self.inner.bans()
    }

    fn has_picture(&self, run: &RunId, place: PicturePlace) -> Result<bool, StoreError> {
        self.inner.has_picture(run, place)
    }
}

impl EtcdStore {
    /// Leaves pictures out that are there, or `here` in the same transaction, or too large for one.
    /// Two may have been under way at a time.
    fn with_new_pictures(
        &self,
        batch: &Batch,
        here: &mut BTreeSet<(RunId, PicturePlace)>,
    ) -> Result<Batch, StoreError> {
        let mut entries = Vec::with_capacity(batch.entries.len());
        for entry in &batch.entries {
            let stays = match entry {
                Entry::Picture(Update::Picture { place, .. }, png) => {
                    let fits = png.len() <= PICTURE_BYTES_MAX;
                    if !fits {
                        let run = &batch.run;
                        warn!(%run, bytes = png.len(), "a picture is too large for etcd");
                    }
                    fits && !self.inner.has_picture(&batch.run, *place)?
                        && here.insert((batch.run.clone(), *place))
                }
                _ => true,
            };
            if stays {
                entries.push(entry.clone());
            }
        }
        Ok(Batch { run: batch.run.clone(), entries })
    }
}

fn is_picture(entry: &Entry) -> bool {
    matches!(entry, Entry::Picture(..))
}

/// Returns about how many bytes an entry takes in etcd.
fn size_of(entry: &Entry) -> usize {
    match entry {
        Entry::Fact(record) => text::render(record).len() + 64,
        Entry::Update(update) => json(update).len() + 64,
        Entry::Picture(_, png) => png.len() + 512,
    }
}

fn picture_key(prefix: &str, run: &RunId, place: PicturePlace) -> String {
    let PicturePlace { step, index, sample } = place;
    format!("{prefix}/pictures/{run}/{step:020}/{index:06}/{sample}")
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain structs are JSON")
}

fn content(key: &str, why: &str) -> StoreError {
    StoreError::Content { what: "a key of etcd", detail: format!("`{key}`: {why}") }
}

fn parsed<T: serde::de::DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(value).map_err(|err| content(key, &err.to_string()))
}

fn run_of(key: &str, name: &str) -> Result<RunId, StoreError> {
    name.parse().map_err(|err: lacuna_types::NameError| content(key, &err.to_string()))
}
