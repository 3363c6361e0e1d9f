//! Tokens: random texts whose digests stand in a file, each with a role.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};

use super::role::{NotARole, Role};

/// What every token begins with, so that scanners for secrets find one that got out.
const PREFIX: &str = "lacuna_";

/// How often it is looked whether the file has changed.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Tokens that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// The file cannot be read.
    #[error("cannot be read")]
    Read(#[source] std::io::Error),
    /// A line means nothing.
    #[error(
        "line {line}: expected `role:sha256 of the token in hex`, and a name behind it if you like"
    )]
    Line {
        /// Number of the line, from 1.
        line: usize,
    },
    /// A line has a role that there is not.
    #[error("line {line}")]
    Role {
        /// Number of the line, from 1.
        line: usize,
        /// What stands there.
        #[source]
        source: NotARole,
    },
    /// Nobody could come in.
    #[error("has no token; make one with `lacuna token new --role admin --add-to FILE`")]
    Empty,
}

/// A line of a file of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenLine {
    /// What its bearer may do.
    pub role: Role,
    /// SHA-256 of the token.
    pub digest: [u8; 32],
    /// Whose it is, for people.
    pub name: String,
}

impl TokenLine {
    /// Describes a token.
    pub fn of(token: &str, role: Role, name: &str) -> Self {
        TokenLine { role, digest: digest(token), name: name.to_string() }
    }

    fn parse(text: &str, line: usize) -> Result<Self, TokensError> {
        let bad = || TokensError::Line { line };
        let (role, rest) = text.split_once(':').ok_or_else(bad)?;
        let role = role.trim().parse().map_err(|source| TokensError::Role { line, source })?;
        let (hex, name) = rest.trim().split_once(char::is_whitespace).unwrap_or((rest.trim(), ""));
        let digest = from_hex(hex).ok_or_else(bad)?;
        Ok(TokenLine { role, digest, name: name.trim().to_string() })
    }
}

impl fmt::Display for TokenLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.role)?;
        self.digest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        if self.name.is_empty() { Ok(()) } else { write!(f, " {}", self.name) }
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut out = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(text.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).ok()?;
        *byte = u8::from_str_radix(pair, 16).ok()?;
    }
    Some(out)
}

/// Makes a new token of 256 random bits.
pub fn new_token() -> String {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).expect("the system has a random source");
    let mut out = PREFIX.to_string();
    for byte in bytes {
        use std::fmt::Write as _;
        write!(out, "{byte:02x}").expect("a string takes everything");
    }
    out
}

/// Whose a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bearer {
    /// What it lets its bearer do.
    pub role: Role,
    /// The name beside it, for the log.
    pub name: String,
}

/// What a file of tokens says.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    bearers: HashMap<[u8; 32], Bearer>,
}

impl Tokens {
    /// Parses the lines of a file; those that are empty or begin with `#` say nothing.
    ///
    /// # Errors
    /// The first line that means nothing, or a file without any token.
    pub fn parse(text: &str) -> Result<Self, TokensError> {
        let (tokens, wrong) = Tokens::read_lines(text);
        match wrong.into_iter().next() {
            Some(error) => Err(error),
            None if tokens.bearers.is_empty() => Err(TokensError::Empty),
            None => Ok(tokens),
        }
    }

    /// Takes the lines that mean something, and says what is wrong with the others.
    fn read_lines(text: &str) -> (Self, Vec<TokensError>) {
        let (mut bearers, mut wrong) = (HashMap::new(), Vec::new());
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match TokenLine::parse(line, i + 1) {
                Ok(TokenLine { role, digest, name }) => {
                    bearers.insert(digest, Bearer { role, name });
                }
                Err(error) => wrong.push(error),
            }
        }
        (Tokens { bearers }, wrong)
    }

    /// Returns whose a token is.
    pub fn bearer_of(&self, token: &str) -> Option<&Bearer> {
        // Found by digest: how long that takes says nothing of a token.
        self.bearers.get(&digest(token))
    }
}

/// A file of tokens that is read again when it changes, by a thread of its own: a file system that
/// does not answer holds no request up.
pub(super) struct TokenFile {
    now: Arc<RwLock<Tokens>>,
}

/// What tells one content of a file from another without reading it.
type Look = (SystemTime, u64, u64);

impl TokenFile {
    pub fn open(path: &Path) -> Result<Self, TokensError> {
        let look = look(path);
        let text = std::fs::read_to_string(path).map_err(TokensError::Read)?;
        let now = Arc::new(RwLock::new(Tokens::parse(&text)?));
        let (weak, path) = (Arc::downgrade(&now), path.to_path_buf());
        let work = move || follow(&path, look, &weak);
        let thread = std::thread::Builder::new().name("tokens".to_string()).spawn(work);
        thread.map_err(TokensError::Read)?;
        Ok(TokenFile { now })
    }

    /// Returns whose a token is, by the file as it was a moment ago.
    pub fn bearer_of(&self, token: &str) -> Option<Bearer> {
        let tokens = self.now.read().unwrap_or_else(PoisonError::into_inner);
        tokens.bearer_of(token).cloned()
    }
}

/// Reads the file whenever it changes, until nobody wants to know.
fn follow(path: &Path, mut seen: Option<Look>, tokens: &Weak<RwLock<Tokens>>) {
    let shown = path.display();
    loop {
        std::thread::sleep(LOOK_EVERY);
        let Some(tokens) = tokens.upgrade() else { return };
        let now = look(path);
        if now == seen {
            continue;
        }
        seen = now;
        let fresh = match std::fs::read_to_string(path) {
            Ok(text) => {
                // Lines that mean nothing let nobody in; the others count, and what was removed
                // is gone, were it the last.
                let (fresh, wrong) = Tokens::read_lines(&text);
                for error in wrong {
                    let error = lacuna_checkpoint::chain(&error);
                    tracing::warn!(path = %shown, error, "a line of tokens is passed over");
                }
                tracing::info!(path = %shown, n = fresh.bearers.len(), "tokens read again");
                fresh
            }
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %shown, "the file of tokens is gone: none is valid");
                Tokens::default()
            }
            Err(error) => {
                tracing::warn!(path = %shown, %error, "tokens cannot be read again");
                seen = None;
                continue;
            }
        };
        *tokens.write().unwrap_or_else(PoisonError::into_inner) = fresh;
    }
}

fn look(path: &Path) -> Option<Look> {
    use std::os::unix::fs::MetadataExt as _;
    let found = std::fs::metadata(path).ok()?;
    Some((found.modified().ok()?, found.len(), found.ino()))
}
