//! Tokens: random texts whose digests stand in a file, each with a role.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use sha2::{Digest as _, Sha256};

use super::role::{NotARole, Role};
use crate::registry::lock;

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

/// What a file of tokens says.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    roles: HashMap<[u8; 32], Role>,
}

impl Tokens {
    /// Parses the lines of a file; those that are empty or begin with `#` say nothing.
    pub fn parse(text: &str) -> Result<Self, TokensError> {
        let mut roles = HashMap::new();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if !line.is_empty() && !line.starts_with('#') {
                let TokenLine { role, digest, .. } = TokenLine::parse(line, i + 1)?;
                roles.insert(digest, role);
            }
        }
        if roles.is_empty() { Err(TokensError::Empty) } else { Ok(Tokens { roles }) }
    }

    /// Returns the role of a token's bearer.
    pub fn role_of(&self, token: &str) -> Option<Role> {
        // Found by digest: how long that takes says nothing of a token.
        self.roles.get(&digest(token)).copied()
    }
}

/// A file of tokens that is read again when it changes.
pub(super) struct TokenFile {
    path: PathBuf,
    state: Mutex<State>,
}

struct State {
    tokens: Tokens,
    modified: Option<SystemTime>,
    looked: Instant,
}

impl TokenFile {
    pub fn open(path: &Path) -> Result<Self, TokensError> {
        let (tokens, modified) = read(path)?;
        let state = Mutex::new(State { tokens, modified, looked: Instant::now() });
        Ok(TokenFile { path: path.to_path_buf(), state })
    }

    /// Returns the role of a token's bearer, by the file as it is now.
    pub fn role_of(&self, token: &str) -> Option<Role> {
        let mut state = lock(&self.state);
        if state.looked.elapsed() > LOOK_EVERY {
            state.looked = Instant::now();
            let modified = std::fs::metadata(&self.path).and_then(|found| found.modified()).ok();
            if modified != state.modified {
                match read(&self.path) {
                    Ok((tokens, modified)) => (state.tokens, state.modified) = (tokens, modified),
                    // Half-written or gone: what was good stays.
                    Err(err) => tracing::warn!(
                        path = %self.path.display(),
                        error = lacuna_checkpoint::chain(&err),
                        "the file of tokens cannot be used; the one read before holds"
                    ),
                }
            }
        }
        state.tokens.role_of(token)
    }
}

fn read(path: &Path) -> Result<(Tokens, Option<SystemTime>), TokensError> {
    let modified = std::fs::metadata(path).and_then(|found| found.modified()).ok();
    let text = std::fs::read_to_string(path).map_err(TokensError::Read)?;
    Ok((Tokens::parse(&text)?, modified))
}
