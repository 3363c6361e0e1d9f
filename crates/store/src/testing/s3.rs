//! What S3 does with a folder of files, whose folders are the buckets.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crc_fast::CrcAlgorithm;

use super::{Head, Kind, Reply};

/// Names of a page of a listing.
const PAGE: usize = 1000;

/// Headers of what is not remembered.
const STAMP: &str = "ETag: \"1\"\r\nLast-Modified: Fri, 03 Jan 2020 10:00:00 GMT\r\n";

/// The files, and what they do not hold.
pub(super) struct Buckets {
    folder: PathBuf,
    page: AtomicUsize,
    ignores_conditions: AtomicBool,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    /// Marks of objects, as lines of a head.
    marks: BTreeMap<PathBuf, String>,
    uploads: BTreeMap<String, Upload>,
    n_begun: u64,
}

struct Upload {
    path: PathBuf,
    marks: String,
    parts: BTreeMap<u32, Vec<u8>>,
}

impl Buckets {
    pub fn new(folder: &Path) -> Self {
        Buckets {
            folder: folder.to_path_buf(),
            page: AtomicUsize::new(PAGE),
            ignores_conditions: AtomicBool::new(false),
            held: Mutex::default(),
        }
    }

    pub fn set_page(&self, names: usize) {
        self.page.store(names, Ordering::Relaxed);
    }

    pub fn ignore_conditions(&self) {
        self.ignores_conditions.store(true, Ordering::Relaxed);
    }

    pub fn n_uploads(&self) -> usize {
        self.held().uploads.len()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what is asked, one request after another; `whole` passes over a range.
    pub fn carry_out(&self, head: &Head, body: Vec<u8>, whole: bool) -> io::Result<Reply> {
        let name = head.path.trim_start_matches('/');
        let path = self.folder.join(name);
        let kind = head.kind();
        let in_bucket = name.split_once('/').map(|(bucket, _)| bucket);
        let reads = matches!(kind, Kind::Get | Kind::Head);
        if !reads && in_bucket.is_some_and(|bucket| !self.folder.join(bucket).is_dir()) {
            return Ok(error("404 Not Found", "NoSuchBucket"));
        }
        if let Some(reply) = wrong_checksum(head, &body) {
            return Ok(reply);
        }
        let mut held = self.held();
        match kind {
            Kind::Get | Kind::Head => self.get(&held, head, &path, whole),
            Kind::List => self.list(head, &path),
            Kind::Put => self.put(&mut held, head, &path, &body),
            Kind::Begin => Ok(held.begin(head, &path)),
            Kind::Part => Ok(held.part(head, body)),
            Kind::Complete => self.complete(&mut held, head, &path, &body),
            Kind::Abort => Ok(match held.uploads.remove(upload_id(head)) {
                Some(_) => Reply::new("204 No Content", "", ""),
                None => error("404 Not Found", "NoSuchUpload"),
            }),
            Kind::Delete => {
                held.marks.remove(&path);
                self.delete(&path)?;
                Ok(Reply::new("204 No Content", "", ""))
            }
        }
    }

    fn get(&self, held: &Held, head: &Head, path: &Path, whole: bool) -> io::Result<Reply> {
        let Ok(content) = fs::read(path) else { return Ok(error("404 Not Found", "NoSuchKey")) };
        let total = content.len() as u64;
        let stamp = held.marks.get(path).map_or(STAMP, String::as_str);
        let Some((from, to)) = head.range.filter(|_| !whole) else {
            return Ok(Reply::new("200 OK", stamp, content));
        };
        let to = to.unwrap_or(u64::MAX).min(total.saturating_sub(1));
        if from > to {
            return Ok(error("416 Range Not Satisfiable", "InvalidRange"));
        }
        let part = &content[from as usize..=to as usize];
        let range = format!("{stamp}Content-Range: bytes {from}-{to}/{total}\r\n");
        Ok(Reply::new("206 Partial Content", range, part))
    }

    /// Tells whether a write must not happen.
    fn is_refused(&self, head: &Head, path: &Path) -> bool {
        let asked = head.headers.get("if-none-match").is_some_and(|value| value == "*");
        asked && path.is_file() && !self.ignores_conditions.load(Ordering::Relaxed)
    }

    fn put(&self, held: &mut Held, head: &Head, path: &Path, body: &[u8]) -> io::Result<Reply> {
        if self.is_refused(head, path) {
            return Ok(error("412 Precondition Failed", "PreconditionFailed"));
        }
        path.parent().map(fs::create_dir_all).transpose()?;
        fs::write(path, body)?;
        let stamp = format!("ETag: \"{}\"\r\n", etag(body));
        held.marks.insert(path.to_path_buf(), STAMP.to_string() + &marks(head));
        Ok(Reply::new("200 OK", stamp, ""))
    }

    fn complete(
        &self,
        held: &mut Held,
        head: &Head,
        path: &Path,
        body: &[u8],
    ) -> io::Result<Reply> {
        let id = upload_id(head);
        let Some(upload) = held.uploads.get(id).filter(|upload| upload.path == path) else {
            return Ok(error("404 Not Found", "NoSuchUpload"));
        };
        if self.is_refused(head, path) {
            return Ok(error("412 Precondition Failed", "PreconditionFailed"));
        }
        let mut content: Vec<u8> = Vec::new();
        for listed in String::from_utf8_lossy(body).split("<Part>").skip(1) {
            let number = between(listed, "PartNumber").parse().unwrap_or(0);
            let wanted = between(listed, "ETag").replace("&quot;", "").replace('"', "");
            match upload.parts.get(&number).filter(|part| etag(part) == wanted) {
                Some(part) => content.extend(part),
                None => return Ok(error("400 Bad Request", "InvalidPart")),
            }
        }
        path.parent().map(fs::create_dir_all).transpose()?;
        fs::write(path, &content)?;
        let marks = STAMP.to_string() + &upload.marks;
        held.marks.insert(path.to_path_buf(), marks);
        held.uploads.remove(id);
        let text = format!(
            "<CompleteMultipartUploadResult><ETag>{}</ETag></CompleteMultipartUploadResult>",
            etag(&content)
        );
        Ok(Reply::new("200 OK", "", text))
    }

    /// Removes a file and the folders that hold nothing any more: there are no empty ones.
    fn delete(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let inside = path.ancestors().skip(1);
        let inside = inside.take_while(|folder| folder.parent() != Some(&self.folder));
        for folder in inside {
            if fs::remove_dir(folder).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Lists a bucket, page by page.
    fn list(&self, head: &Head, bucket: &Path) -> io::Result<Reply> {
        if !bucket.is_dir() {
            return Ok(error("404 Not Found", "NoSuchBucket"));
        }
        let asked = |key: &str| head.query.get(key).map_or("", String::as_str);
        let (prefix, after) = (asked("prefix"), asked("continuation-token"));
        let split = !asked("delimiter").is_empty();
        let mut found: BTreeSet<(String, Option<u64>)> = BTreeSet::new();
        for (key, bytes) in keys(bucket)? {
            let Some(rest) = key.strip_prefix(prefix) else { continue };
            match rest.split_once('/').filter(|_| split) {
                Some((folder, _)) => found.insert((format!("{prefix}{folder}/"), None)),
                None => found.insert((key, Some(bytes))),
            };
        }
        let mut left = found.into_iter().filter(|(name, _)| name.as_str() > after).peekable();
        let page: Vec<(String, Option<u64>)> =
            left.by_ref().take(self.page.load(Ordering::Relaxed)).collect();
        let is_cut = left.peek().is_some();
        let mut text = format!("<ListBucketResult><IsTruncated>{is_cut}</IsTruncated>");
        if let Some((last, _)) = page.last().filter(|_| is_cut) {
            let last = escaped(last);
            text += &format!("<NextContinuationToken>{last}</NextContinuationToken>");
        }
        for (name, bytes) in &page {
            let name = escaped(name);
            text += &match bytes {
                None => format!("<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>"),
                Some(bytes) => format!(
                    "<Contents><Key>{name}</Key><Size>{bytes}</Size><ETag>1</ETag>\
                     <LastModified>2020-01-03T10:00:00.000Z</LastModified></Contents>"
                ),
            };
        }
        Ok(Reply::new("200 OK", "", text + "</ListBucketResult>"))
    }
}

impl Held {
    fn begin(&mut self, head: &Head, path: &Path) -> Reply {
        self.n_begun += 1;
        let id = format!("upload-{}", self.n_begun);
        let (path, marks) = (path.to_path_buf(), marks(head));
        self.uploads.insert(id.clone(), Upload { path, marks, parts: BTreeMap::new() });
        let name = "InitiateMultipartUploadResult";
        Reply::new("200 OK", "", format!("<{name}><UploadId>{id}</UploadId></{name}>"))
    }

    fn part(&mut self, head: &Head, body: Vec<u8>) -> Reply {
        let number = head.query.get("partNumber").and_then(|number| number.parse().ok());
        let Some(upload) = self.uploads.get_mut(upload_id(head)) else {
            return error("404 Not Found", "NoSuchUpload");
        };
        let Some(number @ 1..=10_000) = number else {
            return error("400 Bad Request", "InvalidArgument");
        };
        let stamp = format!("ETag: \"{}\"\r\n", etag(&body));
        upload.parts.insert(number, body);
        Reply::new("200 OK", stamp, "")
    }
}

fn upload_id(head: &Head) -> &str {
    head.query.get("uploadId").map_or("", String::as_str)
}

/// Returns the user's metadata of a request, as lines of a head.
fn marks(head: &Head) -> String {
    let marks = head.headers.iter().filter(|(name, _)| name.starts_with("x-amz-meta-"));
    marks.map(|(name, value)| format!("{name}: {value}\r\n")).collect()
}

fn error(status: &'static str, code: &str) -> Reply {
    Reply::new(status, "", format!("<Error><Code>{code}</Code></Error>"))
}

/// Compares the checksum that came with a request.
fn wrong_checksum(head: &Head, body: &[u8]) -> Option<Reply> {
    let said = head.headers.get("x-amz-checksum-crc64nvme")?;
    let found = crc_fast::checksum(CrcAlgorithm::Crc64Nvme, body);
    (*said != base64(&found.to_be_bytes())).then(|| error("400 Bad Request", "BadDigest"))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for three in bytes.chunks(3) {
        let number = (0..3).fold(0, |n, i| n << 8 | usize::from(*three.get(i).unwrap_or(&0)));
        for i in 0..4 {
            let digit = DIGITS[number >> (18 - 6 * i) & 63];
            out.push(if i > three.len() { '=' } else { char::from(digit) });
        }
    }
    out
}

fn etag(content: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

fn between<'a>(text: &'a str, tag: &str) -> &'a str {
    let start = text.split_once(&format!("<{tag}>")).map_or("", |(_, rest)| rest);
    start.split_once(&format!("</{tag}>")).map_or("", |(inside, _)| inside)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Lists all objects of a bucket with their sizes.
fn keys(bucket: &Path) -> io::Result<Vec<(String, u64)>> {
    let mut found: Vec<(String, u64)> = Vec::new();
    let mut folders = vec![bucket.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let key = path.strip_prefix(bucket).expect("it lies in there").to_string_lossy();
            found.push((key.into_owned(), fs::metadata(&path)?.len()));
        }
    }
    Ok(found)
}
