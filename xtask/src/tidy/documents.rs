//! What text says about places: links that lead nowhere, paths that only one machine has.

use super::{File, Finding, Tree};

/// Folders outside this repository that its text must not name.
const FOREIGN: &[&str] = &[
    concat!("/wo", "rk/"),
    concat!("share", "d/spec"),
    concat!("share", "d/golden"),
    concat!("share", "d/ARCH"),
    concat!("share", "d/STYLE"),
];

/// Checks links of Markdown pages and the places that any text names.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    for file in &tree.files {
        places(tree, file, &mut findings);
        if file.path.ends_with(".md") {
            links(tree, file, &mut findings);
        }
    }
    findings
}

fn places(tree: &Tree, file: &File, findings: &mut Vec<Finding>) {
    for (idx, line) in file.text.lines().enumerate() {
        for place in FOREIGN.iter().filter(|place| line.contains(**place)) {
            let message = format!("names `{place}`, which is not part of this repository");
            findings.push(Finding::new(&file.path, idx + 1, message));
        }
        if let Some(page) = cited_page(line)
            && !tree.has(page)
            && !tree.has(&format!("docs/{page}"))
        {
            let message = format!("cites `{page}`, which is not in this repository");
            findings.push(Finding::new(&file.path, idx + 1, message));
        }
    }
}

/// Finds the first `spec/….md` of a line.
fn cited_page(line: &str) -> Option<&str> {
    let is_path = |c: char| c.is_alphanumeric() || "_-./".contains(c);
    let (at, prefix) =
        line.match_indices("spec/").find(|(at, _)| !line[..*at].ends_with(is_path))?;
    let rest: &str = &line[at + prefix.len()..];
    let length: usize = rest.find(|c: char| !is_path(c)).unwrap_or(rest.len());
    let page: &str = line[at..at + prefix.len() + length].trim_end_matches('.');
    page.ends_with(".md").then_some(page)
}

/// Checks `[text](target)` where the target is a file of this repository.
fn links(tree: &Tree, file: &File, findings: &mut Vec<Finding>) {
    let mut in_fence: bool = false;
    for (idx, line) in file.text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_fence = !in_fence;
        }
        if in_fence {
            continue;
        }
        for target in targets(line) {
            if target.contains("://") || target.starts_with("mailto:") || target.starts_with('#') {
                continue;
            }
            let path: &str = target.split('#').next().unwrap_or_default();
            if !resolve(&file.path, path).is_some_and(|path| tree.has(&path)) {
                let message = format!("link to `{target}` leads nowhere");
                findings.push(Finding::new(&file.path, idx + 1, message));
            }
        }
    }
}

/// Lists the targets of the links of a line, code spans left out.
fn targets(line: &str) -> Vec<String> {
    let text: String = line.split('`').step_by(2).collect::<Vec<&str>>().join(" ");
    let inside = |rest: &str| rest.split([')', ' ']).next().unwrap_or_default().to_owned();
    text.split("](").skip(1).map(inside).collect()
}

/// Resolves a link from the folder of the page; None where it leaves the repository.
fn resolve(page: &str, link: &str) -> Option<String> {
    let mut parts: Vec<&str> = page.split('/').collect();
    parts.pop();
    if link.starts_with('/') {
        return None;
    }
    for part in link.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}
