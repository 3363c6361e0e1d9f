//! Creating whole objects once, replacing them, listing folders and deleting.

use std::collections::BTreeSet;
use std::time::Duration;

use object_store::path::Path;
use object_store::{
    Attribute, Attributes, Error, GetOptions, ObjectStoreExt, PutMode, PutOptions, PutPayload,
};
use tokio_stream::StreamExt;

use crate::error::StoreError;
use crate::fetch::{Trouble, ask, judge, reason, until};
use crate::limits::Stop;
use crate::store::{LISTED_MAX, Pending, Shared, Store};

/// Deletions at a time: a checkpoint of many parts goes soon, and nobody else is crowded out.
const DELETIONS: usize = 8;

/// What creating an object found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Creation {
    /// The name was free and is our object's now.
    Created,
    /// The name is somebody else's; nothing changed.
    Exists,
}

/// A random word that is kept with an object, by which its writer knows it again when the answer
/// was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mark(String);

/// Whose object has a name.
pub(crate) enum Owner {
    Us,
    Another,
    Nobody,
}

impl Mark {
    /// Its key among an object's metadata; Azure allows letters and digits only.
    const KEY: &str = "lacunamark";

    /// Draws a mark for the object with this URL.
    pub fn draw(object: &str) -> Result<Self, StoreError> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|error| StoreError::Unsupported {
            object: object.to_string(),
            why: format!("no mark can be drawn for it: {error}"),
        })?;
        Ok(Mark(format!("{:032x}", u128::from_le_bytes(bytes))))
    }

    /// Returns the mark as metadata of an object.
    pub fn attributes(&self) -> Attributes {
        let key = Attribute::Metadata(Mark::KEY.into());
        Attributes::from_iter([(key, self.0.clone())])
    }

    /// Looks whose object is at `path`.
    pub async fn owner(&self, shared: &Shared, path: &Path) -> Result<Owner, Error> {
        let found = shared.store.get_opts(path, GetOptions::new().with_head(true)).await;
        let key = Attribute::Metadata(Mark::KEY.into());
        match found {
            Ok(found) if found.attributes.get(&key).is_some_and(|mark| **mark == *self.0) => {
                Ok(Owner::Us)
            }
            Ok(_) => Ok(Owner::Another),
            Err(Error::NotFound { .. }) => Ok(Owner::Nobody),
            Err(error) => Err(error),
        }
    }
}

/// Tells whether an error that a write met may pass; what is missing is no object, but what should
/// hold it.
pub(crate) fn judge_write(shared: &Shared, name: &str, error: Error) -> Trouble {
    let why = reason(&error);
    let object = shared.url(name);
    match error {
        Error::NotFound { .. } => Trouble::Never(StoreError::Refused { object, why }),
        _ if why.contains("status code: 501") => {
            Trouble::Never(StoreError::Unsupported { object, why })
        }
        error => judge(shared, name, error),
    }
}

/// Judges a refusal of a conditional write by what has the name; `free` is what to make of it if
/// nothing has.
pub(crate) async fn judge_refusal(
    shared: &Shared,
    name: &str,
    mark: &Mark,
    free: Trouble,
) -> Result<Creation, Trouble> {
    match mark.owner(shared, &shared.path(name)).await {
        Ok(Owner::Us) => Ok(Creation::Created),
        Ok(Owner::Another) => Ok(Creation::Exists),
        Ok(Owner::Nobody) => Err(free),
        Err(error) => Err(judge_write(shared, name, error)),
    }
}

/// What to make of a conflict where nothing has the name: another writer was in the way and failed.
pub(crate) fn passing_conflict(error: &Error) -> Trouble {
    Trouble::Again(format!("refused, but nothing has the name: {}", reason(error)))
}

/// Creates an object; an answer that was lost is found out by asking again.
pub(crate) async fn create(
    shared: &Shared,
    name: &str,
    payload: PutPayload,
    mark: &Mark,
    deadline: Duration,
) -> Result<Creation, StoreError> {
    let path = shared.path(name);
    let patience = shared.limits.upload_patience(payload.content_length() as u64);
    let attempt = || {
        let (payload, attributes) = (payload.clone(), mark.attributes());
        let options = PutOptions { mode: PutMode::Create, attributes, ..PutOptions::default() };
        let put = shared.store.put_opts(&path, payload, options);
        async move {
            match put.await {
                Ok(_) => Ok(Creation::Created),
                Err(error @ (Error::AlreadyExists { .. } | Error::Precondition { .. })) => {
                    judge_refusal(shared, name, mark, passing_conflict(&error)).await
                }
                Err(error) => Err(judge_write(shared, name, error)),
            }
        }
    };
    until(shared, name, deadline, patience, attempt).await
}

impl Store {
    /// Creates a whole object, unless its name is taken.
    ///
    /// # Errors
    /// After [`StoreError::NoAnswer`] the object may be there, or come to be.
    pub fn create(
        &self,
        name: &str,
        bytes: Vec<u8>,
        deadline: Duration,
        stop: &Stop,
    ) -> Result<Creation, StoreError> {
        let mark = Mark::draw(&self.url_of(name))?;
        let owned = name.to_string();
        let pending = self.spawn(name, deadline, async move |shared| {
            create(&shared, &owned, bytes.into(), &mark, deadline).await
        });
        pending.wait(stop)
    }

    /// Writes a small object over whatever has the name.
    pub fn replace(
        &self,
        name: &str,
        bytes: Vec<u8>,
        deadline: Duration,
        stop: &Stop,
    ) -> Result<(), StoreError> {
        let owned = name.to_string();
        let payload = PutPayload::from(bytes);
        let pending = self.spawn(name, deadline, async move |shared| {
            let path = shared.path(&owned);
            let patience = shared.limits.upload_patience(payload.content_length() as u64);
            let attempt = || {
                let put = shared.store.put_opts(&path, payload.clone(), PutOptions::default());
                async { put.await.map_err(|error| judge_write(&shared, &owned, error)) }
            };
            until(&shared, &owned, deadline, patience, attempt).await
        });
        pending.wait(stop).map(|_| ())
    }

    /// Lists the names right under a folder of the store, of objects and of folders, sorted.
    pub fn names(
        &self,
        folder: &str,
        deadline: Duration,
        stop: &Stop,
    ) -> Result<Vec<String>, StoreError> {
        let owned = folder.to_string();
        let pending = self.spawn(folder, deadline, async move |shared| {
            let path = shared.path(&owned);
            let list = || names(&shared, &path);
            ask(&shared, &owned, deadline, shared.limits.attempt, list).await
        });
        pending.wait(stop)
    }

    /// Deletes an object; one that is not there counts as deleted.
    pub fn delete(&self, name: &str, deadline: Duration, stop: &Stop) -> Result<(), StoreError> {
        self.start_delete(name, deadline).wait(stop)
    }

    /// Deletes everything below a folder of the store; each request may take `deadline`.
    pub fn delete_folder(
        &self,
        folder: &str,
        deadline: Duration,
        stop: &Stop,
    ) -> Result<(), StoreError> {
        let owned = folder.to_string();
        let pending = self.spawn(folder, deadline, async move |shared| {
            let path = shared.path(&owned);
            let list = || below(&shared, &path);
            ask(&shared, &owned, deadline, shared.limits.attempt, list).await
        });
        let names = pending.wait(stop)?;
        for names in names.chunks(DELETIONS) {
            let start = |rest: &String| self.start_delete(&format!("{folder}/{rest}"), deadline);
            let under_way: Vec<Pending<()>> = names.iter().map(start).collect();
            under_way.into_iter().try_for_each(|pending| pending.wait(stop))?;
        }
        Ok(())
    }

    fn start_delete(&self, name: &str, deadline: Duration) -> Pending<()> {
        let owned = name.to_string();
        self.spawn(name, deadline, async move |shared| {
            let path = shared.path(&owned);
            let attempt = || async {
                match shared.store.delete(&path).await {
                    Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
                    Err(error) => Err(judge_write(&shared, &owned, error)),
                }
            };
            until(&shared, &owned, deadline, shared.limits.stall, attempt).await
        })
    }
}

async fn names(shared: &Shared, folder: &Path) -> Result<Vec<String>, Error> {
    let found = shared.store.list_with_delimiter(Some(folder)).await?;
    let objects = found.objects.iter().map(|meta| &meta.location);
    // A browser of buckets may have left an object with the folder's own name.
    let first = |place: &Path| Some(place.prefix_match(folder)?.next()?.as_ref().to_string());
    let names: BTreeSet<String> = objects.chain(&found.common_prefixes).filter_map(first).collect();
    Ok(names.into_iter().collect())
}

/// Lists all objects below a folder, by their names from there on.
async fn below(shared: &Shared, folder: &Path) -> Result<Vec<String>, Error> {
    let mut names: Vec<String> = Vec::new();
    let mut stream = shared.store.list(Some(folder));
    while let Some(meta) = stream.next().await {
        let place = meta?.location;
        let rest: Option<Vec<String>> = place
            .prefix_match(folder)
            .map(|rest| rest.map(|part| part.as_ref().to_string()).collect());
        names.extend(rest.filter(|rest| !rest.is_empty()).map(|rest| rest.join("/")));
        if names.len() > LISTED_MAX {
            return Err(Error::NotImplemented {
                operation: format!("listing more than {LISTED_MAX} objects"),
                implementer: "lacuna".to_string(),
            });
        }
    }
    names.sort();
    Ok(names)
}
