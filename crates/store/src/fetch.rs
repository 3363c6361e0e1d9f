//! One range of one object, asked for until it is complete.

use std::ops::Range;
use std::time::Duration;

use object_store::path::Path;
use object_store::{GetOptions, GetRange};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_stream::StreamExt;

use crate::error::StoreError;
use crate::store::Shared;

/// What became of an attempt that did not end well.
pub(crate) enum Trouble {
    /// Another attempt may do better.
    Again(String),
    /// None will.
    Never(StoreError),
}

/// Reads a range whole; attempts go on where the one before ended.
pub(crate) async fn read(
    shared: &Shared,
    name: &str,
    range: Range<u64>,
    deadline: Duration,
) -> Result<Vec<u8>, StoreError> {
    let wanted = (range.end - range.start) as usize;
    let mut out: Vec<u8> = Vec::new();
    if out.try_reserve_exact(wanted).is_err() {
        let (object, why) = (shared.url(name), format!("no memory for {wanted} bytes of it"));
        return Err(StoreError::Unsupported { object, why });
    }
    let path = shared.path(name);
    let start = Instant::now();
    let end = start + deadline;
    let mut attempts: u32 = 0;
    let mut failed_in_row: u32 = 0;
    let mut last = "no attempt was made: too many other requests were under way".to_string();
    while out.len() < wanted {
        let before = out.len();
        let Ok(permit) = timeout_at(end, shared.permits.acquire()).await else { break };
        attempts += 1;
        let asked = Instant::now();
        let attempt = (asked + shared.limits.attempt).min(end);
        let missing = range.start + before as u64..range.end;
        let came = timeout_at(attempt, append(shared, name, &path, missing, &mut out)).await;
        drop(permit);
        shared.stats.add_request((out.len() - before) as u64, attempts > 1);
        last = match came {
            Ok(Ok(())) => continue,
            Ok(Err(Trouble::Never(error))) => return Err(error),
            Ok(Err(Trouble::Again(why))) => why,
            // The time was over before this attempt could say anything: the one before counts.
            Err(_) if attempts > 1 && attempt == end && out.len() == before => last,
            Err(_) => {
                let came = out.len() - before;
                format!("only {came} bytes came in {:.1?}", asked.elapsed())
            }
        };
        failed_in_row = if out.len() > before { 1 } else { failed_in_row + 1 };
        let key = range.start ^ start.elapsed().as_nanos() as u64;
        let pause = shared.limits.backoff(failed_in_row, key);
        if Instant::now() + pause >= end {
            break;
        }
        tracing::debug!(object = name, attempts, why = last, "asking again");
        sleep(pause).await;
    }
    if out.len() == wanted {
        return Ok(out);
    }
    Err(StoreError::Deadline {
        object: shared.url(name),
        range,
        attempts,
        waited: start.elapsed(),
        received: out.len() as u64,
        last,
    })
}

/// Makes one request and appends what comes.
async fn append(
    shared: &Shared,
    name: &str,
    path: &Path,
    range: Range<u64>,
    out: &mut Vec<u8>,
) -> Result<(), Trouble> {
    let wanted = out.len() + (range.end - range.start) as usize;
    let stall = shared.limits.stall;
    let silent = |_| Trouble::Again(format!("no byte came in {stall:.1?}"));
    let options = GetOptions::new().with_range(Some(GetRange::Bounded(range.clone())));
    let answer = timeout(stall, shared.store.get_opts(path, options)).await.map_err(silent)?;
    let answer = answer.map_err(|error| judge(shared, name, error))?;
    if answer.meta.size < range.end {
        return Err(Trouble::Never(StoreError::Size {
            object: shared.url(name),
            found: answer.meta.size,
            expected: range.end,
        }));
    }
    if answer.range != range {
        let found = &answer.range;
        return Err(Trouble::Again(format!("bytes {} to {} came", found.start, found.end)));
    }
    let mut stream = answer.into_stream();
    while let Some(piece) = timeout(stall, stream.next()).await.map_err(silent)? {
        let piece = piece.map_err(|error| judge(shared, name, error))?;
        let room = wanted - out.len();
        out.extend_from_slice(&piece[..piece.len().min(room)]);
    }
    if out.len() < wanted {
        return Err(Trouble::Again(format!("the answer ended {} bytes early", wanted - out.len())));
    }
    Ok(())
}

/// Tells whether an error may pass.
pub(crate) fn judge(shared: &Shared, name: &str, error: object_store::Error) -> Trouble {
    use object_store::Error;
    let object = shared.url(name);
    let why = reason(&error);
    Trouble::Never(match error {
        Error::NotFound { .. } => StoreError::NotFound { object },
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
            StoreError::Refused { object, why }
        }
        Error::NotSupported { .. } => {
            let why = format!("the server gives no ranges of an object: {why}");
            StoreError::Unsupported { object, why }
        }
        Error::NotImplemented { .. } | Error::InvalidPath { .. } => {
            StoreError::Unsupported { object, why }
        }
        _ if is_final(&why) => StoreError::Refused { object, why },
        _ => return Trouble::Again(why),
    })
}

/// Tells whether a status says that asking again is no use; the text is all that has it.
fn is_final(why: &str) -> bool {
    let status = why.split_once("status code: ").and_then(|(_, rest)| rest.get(..3)?.parse().ok());
    let passing = [408, 425, 429];
    let is_redirect = why.contains("redirect");
    is_redirect || status.is_some_and(|s: u16| (300..500).contains(&s) && !passing.contains(&s))
}

/// Returns an error with its causes, without what they repeat.
pub(crate) fn reason(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

/// Asks for something small until it is answered; `patience` bounds an attempt.
pub(crate) async fn ask<T, F>(
    shared: &Shared,
    name: &str,
    deadline: Duration,
    patience: Duration,
    mut request: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, object_store::Error>>,
{
    let attempt = || {
        let answer = request();
        async move { answer.await.map_err(|error| judge(shared, name, error)) }
    };
    until(shared, name, deadline, patience, attempt).await
}

/// Makes attempts until one ends well or in what no attempt can change; `patience` bounds each.
pub(crate) async fn until<T, F>(
    shared: &Shared,
    name: &str,
    deadline: Duration,
    patience: Duration,
    mut attempt: impl FnMut() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = Result<T, Trouble>>,
{
    let start = Instant::now();
    let end = start + deadline;
    let mut attempts: u32 = 0;
    let mut last = String::new();
    loop {
        attempts += 1;
        let until = (Instant::now() + patience).min(end);
        last = match timeout_at(until, attempt()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(Trouble::Never(error))) => return Err(error),
            Ok(Err(Trouble::Again(why))) => why,
            // The time was over before this attempt could say anything: the one before counts.
            Err(_) if attempts > 1 && until == end => last,
            Err(_) => "no answer came".to_string(),
        };
        let pause = shared.limits.backoff(attempts, start.elapsed().as_nanos() as u64);
        if Instant::now() + pause >= end {
            break;
        }
        sleep(pause).await;
    }
    Err(StoreError::NoAnswer { object: shared.url(name), attempts, waited: start.elapsed(), last })
}
