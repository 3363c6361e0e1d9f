//! The index of tar shards behind a URL.

use std::io;
use std::path::Path;
use std::sync::Arc;

use lacuna_store::{Stop, Store};

use super::{BuildIndexError, IndexReport, join, scan, scan_all};
use crate::OnProgress;

/// Most names that a pattern may stand for.
const NAMES_MAX: u64 = 4_000_000;

/// Indexes tar shards of a store, with `threads` threads: all that it lists, or those named.
///
/// Each shard is read once, from beginning to end. Progress counts shards. The index is returned;
/// where it goes is for the caller to say.
pub fn build_index_of_store(
    store: &Arc<Store>,
    names: Option<Vec<String>>,
    threads: usize,
    progress: OnProgress<'_>,
) -> Result<IndexReport, BuildIndexError> {
    let stop = Stop::default();
    let names = match names {
        Some(names) => names,
        None => {
            let listed = store.list(&stop)?.into_iter().map(|object| object.name);
            listed.filter(|name| name.ends_with(".tar")).collect()
        }
    };
    let folder = Path::new(store.url());
    if names.is_empty() {
        return Err(BuildIndexError::NoShards { path: folder.to_path_buf() });
    }
    let scan_one = |i: usize| {
        let name = &names[i];
        let url = store.url_of(name);
        let reader = store.reader(name, &stop)?;
        scan(Path::new(&url), name, reader.bytes(), reader)
    };
    join(folder, scan_all(names.len(), threads, &scan_one, progress)?)
}

/// Expands a pattern of shards as WebDataset has it: `train-{000000..000099}.tar`.
///
/// A name without braces stands for itself.
pub fn expand(pattern: &str) -> Result<Vec<String>, BuildIndexError> {
    let wrong = |why| BuildIndexError::Pattern { pattern: pattern.to_string(), why };
    let Some((before, rest)) = pattern.split_once('{') else {
        return Ok(vec![pattern.to_string()]);
    };
    let (range, after) = rest.split_once('}').ok_or_else(|| wrong("a brace is open"))?;
    if after.contains('{') {
        return Err(wrong("it has more than one pair of braces"));
    }
    let (from, to) = range.split_once("..").ok_or_else(|| wrong("it has no `..`"))?;
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse::<u64>().ok(),
        false => None,
    };
    let (Some(first), Some(last)) = (number(from), number(to)) else {
        return Err(wrong("its ends are no numbers"));
    };
    if first > last || last - first >= NAMES_MAX {
        return Err(wrong("its numbers must rise, and be not too many"));
    }
    let width = from.len();
    Ok((first..=last).map(|n| format!("{before}{n:0width$}{after}")).collect())
}

impl IndexReport {
    /// Puts the index beside its shards.
    pub fn upload(&self, store: &Store) -> Result<(), BuildIndexError> {
        let bytes = self.index.bytes().to_vec();
        Ok(store.put(crate::index::INDEX_NAME, bytes, &Stop::default())?)
    }

    /// Writes the index into a folder.
    pub fn write(&self, folder: &Path) -> Result<(), BuildIndexError> {
        let at = |source: io::Error| BuildIndexError::Io { path: folder.to_path_buf(), source };
        std::fs::create_dir_all(folder).map_err(at)?;
        self.index.write(folder).map_err(at)
    }
}

#[cfg(test)]
mod tests {
    use lacuna_store::Limits;
    use lacuna_store::testing::Server;

    use super::*;
    use crate::dataset::Dataset;
    use crate::fixtures::{grey_png, write_tar};
    use crate::wds::build_index;

    #[test]
    fn patterns() {
        let all = expand("a/train-{008..011}.tar").unwrap();
        assert_eq!(
            all.join(" "),
            "a/train-008.tar a/train-009.tar a/train-010.tar a/train-011.tar"
        );
        assert_eq!(expand("one.tar").unwrap(), ["one.tar"]);
        for bad in ["{1..2", "{1.2}", "{a..b}", "{3..2}", "{1..2}{3..4}", "{0..99999999999}"] {
            assert!(expand(bad).unwrap_err().to_string().contains(bad));
        }
    }

    /// Listed by S3 or named by a pattern: the index that the folder's own would be.
    #[test]
    fn shards_behind_a_url_get_the_same_index() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("bucket/set");
        std::fs::create_dir_all(&folder).unwrap();
        for shard in 0..3 {
            let images: Vec<Vec<u8>> = (0..5).map(|i| grey_png(8 + i, 10 * shard + i)).collect();
            let names: Vec<String> = (0..5).map(|i| format!("{i}.png")).collect();
            let members: Vec<(&str, &[u8])> =
                names.iter().zip(&images).map(|(name, image)| (&**name, &**image)).collect();
            write_tar(&folder.join(format!("x-{shard}.tar")), &members);
        }
        let server = Server::plain(root.path()).unwrap();
        let options = server.s3_options();
        let options: Vec<(&str, &str)> = options.iter().map(|(k, v)| (&**k, &**v)).collect();
        let s3 = Store::open_with("s3://bucket/set", &options, Limits::default()).unwrap();
        let url = format!("{}/bucket/set", server.url());
        let http = Arc::new(Store::open(&url, Limits::default()).unwrap());
        let listed = build_index_of_store(&Arc::new(s3), None, 2, &mut |_| {}).unwrap();
        let names = expand("x-{0..2}.tar").unwrap();
        let named = build_index_of_store(&http, Some(names), 1, &mut |_| {}).unwrap();
        assert_eq!(listed.index.fingerprint(), named.index.fingerprint());
        named.upload(&http).unwrap();
        let remote = Dataset::open(Path::new(&url)).unwrap();
        std::fs::remove_file(folder.join("index.lacuna")).unwrap();
        let local = build_index(&folder, 1, &mut |_| {}).unwrap();
        assert_eq!(remote.fingerprint(), local.index.fingerprint());
        let missing = build_index_of_store(&http, Some(vec!["y.tar".into()]), 1, &mut |_| {});
        assert!(missing.unwrap_err().to_string().contains("/bucket/set/y.tar` is not there"));
    }
}
