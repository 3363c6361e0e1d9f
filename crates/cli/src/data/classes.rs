//! Which classes the labels of `lacuna data pack` stand for.

use std::fs;
use std::path::{Path, PathBuf};

use lacuna_data::pack::{NoLabels, PackReport, PackSource, class_list};
use lacuna_data::synthetic::N_CLASSES;
use lacuna_spec::units::grouped;

use super::pack_error;
use super::talk::usage;

/// Names of classes that are shown; `pack.json` and `--output json` have all of them.
const NAMES_SHOWN: usize = 10;

/// Names of folders that hold parts of a data set, in the order in which one is recommended.
const PARTS: [&str; 5] = ["train", "val", "valid", "validation", "test"];

/// Takes the classes of a folder of images from a list, where one is asked for.
pub(super) fn numbered(source: PackSource, from: Option<&Path>) -> anyhow::Result<PackSource> {
    match (source, from) {
        (source, None) => Ok(source),
        (PackSource::Folder(root), Some(from)) => {
            let classes = class_list(from).map_err(pack_error)?;
            Ok(PackSource::Classed { root, classes })
        }
        (_, Some(_)) => Err(usage(
            "--classes numbers the class folders of images: labels of IDX, MDS and Parquet files \
             are numbers already",
        )),
    }
}

/// Says which folders look like parts of a data set and would become classes.
pub(super) fn parts(source: &PackSource) -> Option<String> {
    let (PackSource::Folder(root) | PackSource::Classed { root, .. }) = source else { return None };
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let entries = fs::read_dir(root).ok()?.filter_map(|entry| Some(entry.ok()?.path()));
    let folders: Vec<PathBuf> =
        entries.filter(|path| !name(path).starts_with('.') && path.is_dir()).collect();
    let of_name = |part: &&str| folders.iter().find(|path| name(path).eq_ignore_ascii_case(part));
    let parts: Vec<&PathBuf> = PARTS.iter().filter_map(of_name).collect();
    let first = parts.first()?;
    // One among others may be a class: of vehicles, or of exams.
    if parts.len() == 1 && folders.len() > 1 {
        return None;
    }
    let names: Vec<String> = parts.iter().map(|path| name(path)).collect();
    Some(format!(
        "by their names the folders in `{}` are parts of a data set and no classes: {}; give one \
         of these folders, such as `{}`",
        root.display(),
        names.join(", "),
        first.display()
    ))
}

/// Says which classes there are, or why there are none; nothing of labels without names.
pub(super) fn told(report: &PackReport, source: &PackSource) -> Option<String> {
    match &report.no_labels {
        Some(one @ NoLabels::OneFolder { .. }) => {
            return Some(format!("none: {one}; --classes takes its number from another data set"));
        }
        Some(why) => return Some(format!("none: {why}")),
        None => {}
    }
    let n = report.classes.len();
    let more = if n > NAMES_SHOWN { ", …" } else { "" };
    let names = report.classes[..n.min(NAMES_SHOWN)].join(", ") + more;
    match (source, n) {
        (PackSource::Synthetic(_), _) => Some(format!("{N_CLASSES} classes")),
        (_, 0) => None,
        (_, 1) => Some(format!("1 class: {names}")),
        (_, n) => Some(format!("{} classes: {names}", grouped(n as u64))),
    }
}
