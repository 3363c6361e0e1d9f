//! Enough of Rust's lexer to tell code from comments and strings.

#[cfg(test)]
mod tests;

/// The lines of a Rust file with comments and the content of strings blanked.
pub struct Source {
    /// One entry a line; columns are not kept.
    pub code: Vec<String>,
    /// The line (0-based) from which on the file is its own test module.
    tests_from: usize,
}

enum State {
    Code,
    LineComment,
    BlockComment { depth: usize },
    Text,
    RawText { n_hashes: usize },
}

impl Source {
    /// Reads a file; `path` tells whether all of it is test code.
    pub fn parse(path: &str, text: &str) -> Source {
        let code: Vec<String> = blank(text).lines().map(str::to_owned).collect();
        let tests_from: usize = if is_test_path(path) { 0 } else { inline_tests(&code) };
        Source { code, tests_from }
    }

    /// Lists the lines of code with their 1-based numbers and whether they are test code.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &str, bool)> {
        self.code
            .iter()
            .enumerate()
            .map(|(idx, line)| (idx + 1, line.as_str(), idx >= self.tests_from))
    }
}

/// Tells whether `word` occurs in `code` with nothing of an identifier on either side.
pub fn has_word(code: &str, word: &str) -> bool {
    let is_identifier = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        !code[..at].ends_with(is_identifier) && !code[at + word.len()..].starts_with(is_identifier)
    })
}

fn is_test_path(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.starts_with("tests/") || path.contains("/tests/")
}

/// Finds `#[cfg(test)] mod … {`, which by convention ends a file.
fn inline_tests(code: &[String]) -> usize {
    let mut after_attribute: bool = false;
    for (idx, line) in code.iter().enumerate() {
        let line: &str = line.trim();
        if after_attribute && line.contains("mod ") && line.ends_with('{') {
            return idx;
        }
        if !line.is_empty() {
            after_attribute =
                line.starts_with("#[cfg(test)]") || (after_attribute && line.starts_with("#["));
        }
    }
    usize::MAX
}

/// Replaces comments and the content of strings by blanks, line breaks kept.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut state = State::Code;
    let mut at: usize = 0;
    while at < chars.len() {
        let (taken, shown, next) = step(&chars, at, state);
        for &c in &chars[at..at + taken] {
            out.push(if c == '\n' || shown { c } else { ' ' });
        }
        at += taken;
        state = next;
    }
    out
}

/// Reads one token's worth of characters: how many, whether they are code, and what follows.
fn step(chars: &[char], at: usize, state: State) -> (usize, bool, State) {
    let starts = |word: &str| word.chars().enumerate().all(|(i, c)| chars.get(at + i) == Some(&c));
    match state {
        State::Code => code_step(chars, at),
        State::LineComment if starts("\n") => (1, true, State::Code),
        State::LineComment => (1, false, State::LineComment),
        State::BlockComment { depth } if starts("/*") => {
            (2, false, State::BlockComment { depth: depth + 1 })
        }
        State::BlockComment { depth: 1 } if starts("*/") => (2, false, State::Code),
        State::BlockComment { depth } if starts("*/") => {
            (2, false, State::BlockComment { depth: depth - 1 })
        }
        State::BlockComment { depth } => (1, false, State::BlockComment { depth }),
        State::Text if starts("\\") => (2.min(chars.len() - at), false, State::Text),
        State::Text if starts("\"") => (1, true, State::Code),
        State::Text => (1, false, State::Text),
        State::RawText { n_hashes } if starts(&format!("\"{}", "#".repeat(n_hashes))) => {
            (1 + n_hashes, true, State::Code)
        }
        State::RawText { n_hashes } => (1, false, State::RawText { n_hashes }),
    }
}

fn code_step(chars: &[char], at: usize) -> (usize, bool, State) {
    let get = |i: usize| chars.get(at + i).copied().unwrap_or('\0');
    match (get(0), get(1)) {
        ('/', '/') => (2, false, State::LineComment),
        ('/', '*') => (2, false, State::BlockComment { depth: 1 }),
        ('"', _) => (1, true, State::Text),
        // An escape: up to and with the closing quote, 10 characters for `'\u{10ffff}'`.
        ('\'', '\\') => {
            let length: usize = (3..12).find(|&i| get(i) == '\'').map_or(2, |i| i + 1);
            (length, false, State::Code)
        }
        ('\'', c) if c != '\'' && get(2) == '\'' => (3, false, State::Code),
        ('r', '"' | '#') if at == 0 || !is_in_name(chars[at - 1]) => {
            let n_hashes: usize = (1..).take_while(|&i| get(i) == '#').count();
            if get(1 + n_hashes) == '"' {
                (2 + n_hashes, true, State::RawText { n_hashes })
            } else {
                (1, true, State::Code)
            }
        }
        _ => (1, true, State::Code),
    }
}

/// `b` may stand before `r`, as in `br"…"`.
fn is_in_name(c: char) -> bool {
    c != 'b' && (c.is_alphanumeric() || c == '_')
}
