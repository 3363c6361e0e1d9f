//! A large object that is sent in parts and appears when the last one is there.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use object_store::multipart::{MultipartStore, PartId};
use object_store::{Error, MultipartId, PutMultipartOptions, PutPayload};

use crate::error::StoreError;
use crate::fetch::{ask, until};
use crate::limits::Stop;
use crate::put::{Creation, Mark, Owner, create, judge_refusal, judge_write, passing_conflict};
use crate::store::{Pending, Shared, Store};

/// Bytes of a part at least, and of an object that goes in one request at most.
pub const PART_BYTES_MIN: u64 = 16 << 20;

/// Bytes of a part at most: S3's limit.
const PART_BYTES_MAX: u64 = 5 << 30;

/// Parts that an object is cut into at most: S3 allows 10,000, and a size may be an estimate.
const PARTS_MAX: u64 = 9000;

/// Parts under way: with the one that is being filled, 64 MiB of memory.
const UNDER_WAY: usize = 3;

/// How long an upload that failed waits for its parts to be thrown away.
const ABORT_DEADLINE: Duration = Duration::from_secs(5);

/// An object under construction; dropped before it is finished, it never was.
///
/// What fits into one part is created by one request. The name is looked at before the first part
/// is sent, and again by the store when the last one is there, if it is S3.
pub struct Upload {
    store: Arc<Store>,
    name: String,
    deadline: Duration,
    mark: Mark,
    part_bytes: usize,
    piece: Vec<u8>,
    parts: Parts,
}

/// What was sent.
enum Parts {
    /// Nothing yet.
    None,
    /// Nothing, and nothing will be: the name is taken.
    Taken,
    Some {
        id: MultipartId,
        under_way: VecDeque<Pending<PartId>>,
        done: Vec<PartId>,
    },
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Upload({})", self.store.url_of(&self.name))
    }
}

impl Store {
    /// Begins an object of about `bytes` bytes; nothing is sent yet. Each request may take
    /// `deadline`, and as much longer as its bytes need on a slow line.
    pub fn upload(
        self: &Arc<Self>,
        name: &str,
        bytes: u64,
        deadline: Duration,
    ) -> Result<Upload, StoreError> {
        let part = bytes.div_ceil(PARTS_MAX).clamp(PART_BYTES_MIN, PART_BYTES_MAX);
        self.upload_in_parts(name, part.min(bytes.max(1)), part, deadline)
    }

    /// Begins an object in parts of `part_bytes`, with memory for `expected` bytes; S3 takes no
    /// parts of less than 5 MiB but the last.
    pub fn upload_in_parts(
        self: &Arc<Self>,
        name: &str,
        expected: u64,
        part_bytes: u64,
        deadline: Duration,
    ) -> Result<Upload, StoreError> {
        let object = self.url_of(name);
        let mark = Mark::draw(&object)?;
        let mut piece: Vec<u8> = Vec::new();
        if piece.try_reserve_exact(expected as usize).is_err() {
            let why = format!("no memory for {expected} bytes of it");
            return Err(StoreError::Unsupported { object, why });
        }
        let (store, name, part_bytes) = (self.clone(), name.to_string(), part_bytes as usize);
        Ok(Upload { store, name, deadline, mark, part_bytes, piece, parts: Parts::None })
    }
}

impl Upload {
    /// Appends bytes; waits where too much is under way.
    pub fn write_all(&mut self, mut bytes: &[u8], stop: &Stop) -> Result<(), StoreError> {
        while !bytes.is_empty() {
            // A full piece is kept until there is more: it may be the whole object.
            if self.piece.len() == self.part_bytes {
                self.send(stop)?;
            }
            let n = bytes.len().min(self.part_bytes - self.piece.len());
            self.piece.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// Sends what is left and creates the object, unless its name is taken.
    ///
    /// # Errors
    /// After [`StoreError::NoAnswer`] the object may be there.
    pub fn finish(mut self, stop: &Stop) -> Result<Creation, StoreError> {
        match self.parts {
            Parts::Taken => return Ok(Creation::Exists),
            Parts::None => return self.create_whole(stop),
            Parts::Some { .. } => self.send(stop)?,
        }
        let Parts::Some { id, under_way, done } = &mut self.parts else {
            unreachable!("sending a part does not forget the ones before")
        };
        while let Some(pending) = under_way.pop_front() {
            done.push(pending.wait(stop)?);
        }
        let (id, parts) = (id.clone(), std::mem::take(done));
        let (name, mark, deadline) = (self.name.clone(), self.mark.clone(), self.deadline);
        let completing = self.store.spawn(&self.name, deadline, async move |shared| {
            complete(&shared, &name, &id, parts, &mark, deadline).await
        });
        let found = completing.wait(stop)?;
        if found == Creation::Created {
            self.parts = Parts::None;
        }
        Ok(found)
    }

    fn create_whole(&mut self, stop: &Stop) -> Result<Creation, StoreError> {
        let payload = PutPayload::from(std::mem::take(&mut self.piece));
        let deadline = self.time(payload.content_length());
        let (name, mark) = (self.name.clone(), self.mark.clone());
        let creating = self.store.spawn(&self.name, deadline, async move |shared| {
            create(&shared, &name, payload, &mark, deadline).await
        });
        creating.wait(stop)
    }

    /// Sends the piece as the next part.
    fn send(&mut self, stop: &Stop) -> Result<(), StoreError> {
        if matches!(self.parts, Parts::None) {
            self.parts = self.begin(stop)?;
        }
        let Parts::Some { id, under_way, done } = &mut self.parts else {
            self.piece.clear();
            return Ok(());
        };
        if under_way.len() == UNDER_WAY
            && let Some(pending) = under_way.pop_front()
        {
            done.push(pending.wait(stop)?);
        }
        let idx = done.len() + under_way.len();
        let next: Vec<u8> = Vec::with_capacity(self.part_bytes);
        let payload = PutPayload::from(std::mem::replace(&mut self.piece, next));
        let (id, name) = (id.clone(), self.name.clone());
        let patience = self.store.limits().upload_patience(payload.content_length() as u64);
        let deadline = self.deadline.max(patience.saturating_mul(2));
        under_way.push_back(self.store.spawn(&self.name, deadline, async move |shared| {
            let (path, multipart) = (shared.path(&name), multipart(&shared, &name)?);
            let attempt = || {
                let put = multipart.put_part(&path, &id, idx, payload.clone());
                async { put.await.map_err(|error| judge_write(&shared, &name, error)) }
            };
            until(&shared, &name, deadline, patience, attempt).await
        }));
        Ok(())
    }

    /// Looks whether the name is free and asks for an upload.
    fn begin(&self, stop: &Stop) -> Result<Parts, StoreError> {
        let (name, mark, deadline) = (self.name.clone(), self.mark.clone(), self.deadline);
        let beginning = self.store.spawn(&self.name, deadline, async move |shared| {
            let (path, multipart) = (shared.path(&name), multipart(&shared, &name)?);
            let patience = shared.limits.stall;
            let look = || mark.owner(&shared, &path);
            match ask(&shared, &name, deadline, patience, look).await? {
                Owner::Nobody => {}
                Owner::Us | Owner::Another => return Ok(Parts::Taken),
            }
            let attempt = || {
                let attributes = mark.attributes();
                let options = PutMultipartOptions { attributes, ..PutMultipartOptions::default() };
                let begun = multipart.create_multipart_opts(&path, options);
                async {
                    let id = match begun.await {
                        // Azure keeps no mark with a list of blocks, and takes the list twice.
                        Err(Error::NotSupported { .. }) => multipart.create_multipart(&path).await,
                        id => id,
                    };
                    id.map_err(|error| judge_write(&shared, &name, error))
                }
            };
            let id = until(&shared, &name, deadline, patience, attempt).await?;
            Ok(Parts::Some { id, under_way: VecDeque::new(), done: Vec::new() })
        });
        beginning.wait(stop)
    }

    /// Returns how long a request with so many bytes may take in all.
    fn time(&self, bytes: usize) -> Duration {
        self.deadline.max(self.store.limits().upload_patience(bytes as u64).saturating_mul(2))
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Parts::Some { id, under_way, .. } = std::mem::replace(&mut self.parts, Parts::None)
        else {
            return;
        };
        // Parts that come after the end of their upload would be kept, and paid for.
        drop(under_way);
        let (name, deadline) = (self.name.clone(), self.deadline.min(ABORT_DEADLINE));
        let aborting = self.store.spawn(&self.name, deadline, async move |shared| {
            let (path, multipart) = (shared.path(&name), multipart(&shared, &name)?);
            let attempt = || async {
                match multipart.abort_multipart(&path, &id).await {
                    Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
                    Err(error) => Err(judge_write(&shared, &name, error)),
                }
            };
            until(&shared, &name, deadline, shared.limits.stall, attempt).await
        });
        if let Err(error) = aborting.wait(&Stop::default()) {
            let object = self.store.url_of(&self.name);
            tracing::warn!(%object, %error, "parts of an upload that failed may be left");
        }
    }
}

fn multipart(shared: &Shared, name: &str) -> Result<Arc<dyn MultipartStore>, StoreError> {
    shared.multipart.clone().ok_or_else(|| StoreError::Unsupported {
        object: shared.url(name),
        why: "the store takes no objects in parts".to_string(),
    })
}

/// Makes the object of its parts.
async fn complete(
    shared: &Shared,
    name: &str,
    id: &MultipartId,
    parts: Vec<PartId>,
    mark: &Mark,
    deadline: Duration,
) -> Result<Creation, StoreError> {
    let (path, multipart) = (shared.path(name), multipart(shared, name)?);
    let attempt = || {
        let completing = multipart.complete_multipart(&path, id, parts.clone());
        async move {
            match completing.await {
                Ok(_) => Ok(Creation::Created),
                Err(error @ Error::NotFound { .. }) => {
                    // An upload that was completed is gone as well; its answer was lost.
                    let gone = judge_write(shared, name, error);
                    judge_refusal(shared, name, mark, gone).await
                }
                Err(error @ (Error::AlreadyExists { .. } | Error::Precondition { .. })) => {
                    judge_refusal(shared, name, mark, passing_conflict(&error)).await
                }
                Err(error) => Err(judge_write(shared, name, error)),
            }
        }
    };
    // A store may put the parts together only now.
    let patience = shared.limits.attempt;
    until(shared, name, deadline, patience, attempt).await
}

#[cfg(test)]
mod tests;
