//! Folders and URLs: where data lies and checkpoints go.

use super::suggest::{closest, quoted};
use super::{Reader, UNAVAILABLE};
use crate::fields::{Kind, field};
use crate::problem::echo;

/// Longest accepted path, in bytes: PATH_MAX of Linux.
const PATH_BYTES_MAX: usize = 4096;

/// What is wrong with a location, behind its key, and what to do.
type Fault = (String, String);

impl Reader<'_> {
    /// Reads a folder, or a URL of one of the schemes of its field.
    pub(super) fn place(&mut self, path: &str) -> Option<String> {
        let text = self.text(path)?;
        let Kind::Place(schemes) = field(path).kind else {
            panic!("`{path}` is not a place in the table of fields");
        };
        let fault = match split_url(text) {
            Some((scheme, rest)) => url_fault(scheme, rest, schemes),
            None if self.stored => None,
            None => path_fault(text, schemes),
        };
        let Some((message, fix)) = text_fault(text, schemes).or(fault) else {
            return Some(text.to_string());
        };
        self.problem_among(&[path], format!("`{path}`{message}"), Some(fix));
        None
    }
}

/// Splits `s3://bucket/key`.
fn split_url(text: &str) -> Option<(&str, &str)> {
    text.split_once("://")
}

/// Says what would be a good location.
fn give(schemes: &[&str]) -> String {
    match schemes {
        [] => "give a folder".to_string(),
        _ => format!("give a folder, or a URL of {}", quoted(schemes)),
    }
}

/// What no location may look like.
fn text_fault(text: &str, schemes: &[&str]) -> Option<Fault> {
    let message = if text.trim().is_empty() {
        " is empty".to_string()
    } else if text.len() > PATH_BYTES_MAX {
        format!(" has {} bytes, more than {PATH_BYTES_MAX}", text.len())
    } else if text.chars().any(char::is_control) {
        format!(" = `{}` holds control characters", echo(text))
    } else {
        return None;
    };
    Some((message, give(schemes)))
}

/// What a store would refuse later, and what must not be stored in a spec.
fn url_fault(scheme: &str, rest: &str, schemes: &[&str]) -> Option<Fault> {
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let user = authority.rsplit_once('@').map(|(user, _)| user);
    // Azure writes `container@account`.
    let is_secret = |user: &str| user.contains(':') || !matches!(scheme, "abfs" | "az");
    if user.is_some_and(is_secret) {
        let message = " holds a user or a password, which would be stored and printed".to_string();
        let fix = "remove it: credentials come from the environment (AWS_..., GOOGLE_..., \
                   AZURE_...)";
        return Some((message, fix.to_string()));
    }
    if !schemes.contains(&scheme) {
        let message = format!(": storage `{}://` {UNAVAILABLE}", echo(scheme));
        let fix = match closest(scheme, schemes.iter().copied()) {
            _ if scheme == "file" => "write the path alone".to_string(),
            Some(known) => format!("did you mean `{known}://`?"),
            None => give(schemes),
        };
        return Some((message, fix));
    }
    if let Some(fault) = pattern_fault(&format!("{scheme}://{rest}"), rest) {
        return Some(fault);
    }
    if rest.contains(['?', '#']) {
        let message = " has a query or a fragment, which stores do not take".to_string();
        return Some((message, "remove it from `?` or `#` on".to_string()));
    }
    if authority.is_empty() {
        let message = format!(" = `{scheme}://{}` names no bucket or host", echo(rest));
        return Some((message, format!("write `{scheme}://NAME/FOLDER`")));
    }
    None
}

/// Names of many files in one: nothing replaces them here.
fn pattern_fault(text: &str, path: &str) -> Option<Fault> {
    let part = path.split('/').find(|part| part.contains('{') && part.contains('}'))?;
    let message = format!(" = `{}` holds the pattern `{}`", echo(text), echo(part));
    Some((message, "give the folder, or its `index.lacuna`".to_string()))
}

/// What a shell would have replaced, and URLs that are none.
fn path_fault(text: &str, schemes: &[&str]) -> Option<Fault> {
    // A file's folder may stand before what was written.
    let mut parts = text.split('/');
    if let Some(scheme) = parts.clone().find_map(|part| {
        let scheme = part.strip_suffix(':')?;
        schemes.contains(&scheme).then_some(scheme)
    }) {
        let message = format!(" = `{}` is a URL with one slash", echo(text));
        return Some((message, format!("write `{scheme}://`")));
    }
    if let Some(scheme) = parts.clone().next().and_then(|part| {
        let (scheme, rest) = part.split_once(':')?;
        (schemes.contains(&scheme) && !rest.is_empty()).then_some(scheme)
    }) {
        let message = format!(" = `{}` is a URL without slashes", echo(text));
        return Some((message, format!("write `{scheme}://`")));
    }
    if let Some(fault) = pattern_fault(text, text) {
        return Some(fault);
    }
    let of_shell = |part: &&str| *part == "~" || part.starts_with('$') || part.contains("${");
    let part = parts.find(of_shell)?;
    let message = format!(" = `{}` holds `{}`, which is not replaced here", echo(text), echo(part));
    Some((message, "write the whole path".to_string()))
}
