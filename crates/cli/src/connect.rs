//! How a command finds its coordinator: by its flags, by the environment, or by a context in the
//! user's settings.
//!
//! ```toml
//! # ~/.config/lacuna/config.toml
//! context = "lab"
//!
//! [contexts.lab]
//! coordinator = "https://gpu-01:7070"
//! token_file = "~/.config/lacuna/lab.token"
//! tls_dir = "~/.config/lacuna/lab-tls"
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use clap::Args;
use lacuna_api::client::{Client, ClientError};
use lacuna_api::tls::Credentials;
use serde::Deserialize;

/// Where a coordinator is looked for that nothing names.
const LOCAL: &str = "http://127.0.0.1:7070";
/// How long a call may take where nobody says.
const CALL: Duration = Duration::from_secs(10);
/// How long an election may take for those who wait for its end.
const ELECTION: Duration = Duration::from_secs(60);
/// Longest file of settings that is read.
const SETTINGS_BYTES_MAX: u64 = 1 << 20;

/// How to reach the coordinator.
#[derive(Args, Clone, Debug)]
pub struct Connect {
    /// Address of the coordinator; of several that share their state, all of them with commas
    /// [default: that of the context, else LACUNA_COORDINATOR, else
    /// http://127.0.0.1:7070].
    #[arg(long, short, value_name = "URL", conflicts_with = "context")]
    coordinator: Option<String>,

    /// A context of ~/.config/lacuna/config.toml; also LACUNA_CONTEXT.
    #[arg(long, value_name = "NAME")]
    context: Option<String>,

    /// The address that the environment names; not on the command line.
    #[arg(skip = std::env::var("LACUNA_COORDINATOR").ok().filter(|url| !url.is_empty()))]
    address: Option<String>,

    /// How long a call may take [default: 10s].
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    timeout: Option<Duration>,

    /// File with a token (`lacuna token new`).
    #[arg(long, env = "LACUNA_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// Folder with `ca.pem`, and `cert.pem` with `key.pem` where the coordinator wants certificates
    /// (`lacuna tls init`).
    #[arg(long, env = "LACUNA_TLS_DIR", value_name = "FOLDER")]
    tls_dir: Option<PathBuf>,
}

/// What stands before the command: `lacuna -c URL runs` is `lacuna runs -c URL`.
static BEFORE: OnceLock<Connect> = OnceLock::new();

/// A coordinator, and how to prove who one is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Its address.
    #[serde(default)]
    pub coordinator: Option<String>,
    /// File with a token.
    #[serde(default)]
    pub token_file: Option<PathBuf>,
    /// Folder with certificates.
    #[serde(default)]
    pub tls_dir: Option<PathBuf>,
}

impl Target {
    /// Returns its address.
    pub fn url(&self) -> &str {
        self.coordinator.as_deref().unwrap_or(LOCAL)
    }
}

/// The user's settings.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    #[serde(default)]
    context: Option<String>,
    #[serde(default)]
    contexts: BTreeMap<String, Target>,
}

impl Connect {
    /// Has these settings hold where a command has none of its own, once.
    pub fn stand_before(self) {
        // It is set once, at the start.
        let _ = BEFORE.set(self);
    }

    /// Returns these settings over those that stand before the command.
    fn over(&self, before: Option<&Connect>) -> Connect {
        let Some(before) = before else { return self.clone() };
        let mut whole = self.clone();
        // Whoever names one of the two here does not mean the other one there.
        if whole.coordinator.is_none() && whole.context.is_none() {
            whole.coordinator.clone_from(&before.coordinator);
            whole.context.clone_from(&before.context);
        }
        whole.timeout = whole.timeout.or(before.timeout);
        whole.token_file = whole.token_file.or_else(|| before.token_file.clone());
        whole.tls_dir = whole.tls_dir.or_else(|| before.tls_dir.clone());
        whole
    }

    /// Tells whether somebody says where the coordinator is.
    pub fn names_one(&self) -> bool {
        self.target().is_ok_and(|target| target.coordinator.is_some())
    }

    /// Connects.
    pub async fn client(&self) -> Result<Client, ClientError> {
        let target = self.target()?;
        let credentials =
            Credentials::read(target.token_file.as_deref(), target.tls_dir.as_deref())?;
        Client::connect_as(target.url(), self.timeout(), &credentials).await
    }

    /// Returns how long a call may take.
    pub fn timeout(&self) -> Duration {
        self.over(BEFORE.get()).timeout.unwrap_or(CALL)
    }

    /// Returns how long who follows a run waits for its coordinator to come back: of several,
    /// another one has to be elected first.
    pub fn patience(&self) -> Duration {
        let several = self.target().is_ok_and(|target| target.url().contains(','));
        if several { self.timeout().max(ELECTION) } else { self.timeout() }
    }

    /// Finds out who is meant: `--coordinator`, then `--context`, then the environment's address,
    /// then the context that the settings name. Who names an address is not given the token of a
    /// context: that goes to its own coordinator only.
    pub fn target(&self) -> Result<Target, ClientError> {
        self.over(BEFORE.get()).whole_target()
    }

    fn whole_target(&self) -> Result<Target, ClientError> {
        let by_hand = |coordinator: Option<String>| Target {
            coordinator,
            token_file: self.token_file.clone(),
            tls_dir: self.tls_dir.clone(),
        };
        if let Some(url) = &self.coordinator {
            return Ok(by_hand(Some(url.clone())));
        }
        let named = self.context.clone().or_else(|| std::env::var("LACUNA_CONTEXT").ok());
        if let (None, Some(url)) = (&self.context, &self.address) {
            return Ok(by_hand(Some(url.clone())));
        }
        let Some(path) = settings_file() else { return Ok(by_hand(None)) };
        let home = std::env::home_dir();
        let of_context = context(&path, named.as_deref(), home.as_deref())?;
        Ok(Target {
            coordinator: of_context.coordinator,
            token_file: self.token_file.clone().or(of_context.token_file),
            tls_dir: self.tls_dir.clone().or(of_context.tls_dir),
        })
    }
}

/// Returns where the user's settings are.
fn settings_file() -> Option<PathBuf> {
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    let config = config.filter(|path| path.is_absolute());
    let config = config.or_else(|| Some(std::env::home_dir()?.join(".config")))?;
    Some(config.join("lacuna").join("config.toml"))
}

/// Reads a context; without a name the one that the settings name, if they do.
fn context(path: &Path, name: Option<&str>, home: Option<&Path>) -> Result<Target, ClientError> {
    let wrong = |why: String| ClientError::Settings { path: path.display().to_string(), why };
    let text = match std::fs::metadata(path) {
        Ok(found) if found.len() > SETTINGS_BYTES_MAX => {
            return Err(wrong("it is larger than settings can be".to_string()));
        }
        Ok(_) => std::fs::read_to_string(path).map_err(|err| wrong(err.to_string()))?,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => match name {
            None => return Ok(Target::default()),
            Some(name) => return Err(wrong(format!("there is none, and no context `{name}`"))),
        },
        Err(err) => return Err(wrong(err.to_string())),
    };
    let mut settings: Settings =
        toml::from_str(&text).map_err(|err| wrong(err.to_string().trim().to_string()))?;
    let Some(name) = name.map(str::to_string).or(settings.context.take()) else {
        return Ok(Target::default());
    };
    let target = settings.contexts.remove(&name).ok_or_else(|| {
        let known: Vec<&str> = settings.contexts.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "none".to_string() } else { known.join(", ") };
        wrong(format!("there is no context `{name}`; it has {known}"))
    })?;
    // Relative paths start from the folder of the settings.
    let folder = path.parent().unwrap_or(Path::new("."));
    let whole = |path: PathBuf| match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => folder.join(path),
    };
    Ok(Target {
        token_file: target.token_file.map(whole),
        tls_dir: target.tls_dir.map(whole),
        ..target
    })
}

/// Reads a span of time, `90s`, `15min`, `24h` or `7d`; a number alone is none.
pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor = match unit {
        "s" => Some(1),
        "min" | "m" => Some(60),
        "h" => Some(3600),
        "d" => Some(86_400),
        _ => None,
    };
    let seconds = number.parse::<u64>().ok().zip(factor).and_then(|(n, f)| n.checked_mul(f));
    match seconds {
        Some(seconds) if seconds > 0 => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("`{text}` is not a time such as 90s, 15min, 24h or 7d")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        (dir, path)
    }

    #[test]
    fn a_token_goes_to_its_own_coordinator_only() {
        let of = |coordinator: Option<&str>, address: Option<&str>| Connect {
            coordinator: coordinator.map(str::to_string),
            context: None,
            address: address.map(str::to_string),
            timeout: None,
            token_file: Some("mine".into()),
            tls_dir: None,
        };
        for (flag, env, want) in [
            (Some("http://a"), None, "http://a"),
            (Some("http://a"), Some("http://b"), "http://a"),
            (None, Some("http://b"), "http://b"),
        ] {
            let target = of(flag, env).target().unwrap();
            assert_eq!((target.url(), target.tls_dir.as_ref()), (want, None));
            assert_eq!(target.token_file, Some("mine".into()));
        }
    }

    #[test]
    fn what_stands_behind_the_command_counts_more() {
        let of = |coordinator: Option<&str>, context: Option<&str>, timeout| Connect {
            coordinator: coordinator.map(str::to_string),
            context: context.map(str::to_string),
            address: None,
            timeout,
            token_file: None,
            tls_dir: None,
        };
        let (short, long) = (Some(Duration::from_secs(1)), Some(Duration::from_secs(9)));
        let before = of(Some("http://a"), None, long);
        let whole = of(None, None, None).over(Some(&before));
        assert_eq!((whole.coordinator.as_deref(), whole.timeout), (Some("http://a"), long));
        let whole = of(None, Some("lab"), short).over(Some(&before));
        assert_eq!((whole.coordinator, whole.context.as_deref()), (None, Some("lab")));
        assert_eq!(whole.timeout, short);
    }

    const TWO: &str = "context = \"lab\"\n[contexts.lab]\ncoordinator = \"https://gpu-01:7070\"\n\
                       token_file = \"lab.token\"\ntls_dir = \"~/tls\"\n[contexts.home]\n";

    #[test]
    fn contexts() {
        let (dir, path) = settings(TWO);
        let home = Some(Path::new("/home/me"));
        let lab = context(&path, None, home).unwrap();
        assert_eq!(lab.url(), "https://gpu-01:7070");
        assert_eq!(lab.token_file, Some(dir.path().join("lab.token")));
        assert_eq!(lab.tls_dir, Some("/home/me/tls".into()));
        assert_eq!(context(&path, Some("home"), home).unwrap().url(), LOCAL);
        let other = context(&path, Some("labb"), home).unwrap_err().to_string();
        assert!(other.contains("no context `labb`; it has home, lab"), "{other}");
    }

    #[test]
    fn settings_that_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let none = dir.path().join("config.toml");
        assert_eq!(context(&none, None, None).unwrap(), Target::default());
        let err = context(&none, Some("lab"), None).unwrap_err().to_string();
        assert!(err.contains("config.toml") && err.contains("no context `lab`"), "{err}");
        for text in ["contexts = 3", "[contexts.lab]\ncoordinatr = \"x\"", "context = \"no"] {
            let (_dir, path) = settings(text);
            let err = context(&path, None, None).unwrap_err().to_string();
            assert!(err.contains("config.toml") && err.contains("line"), "{text}: {err}");
        }
    }
}
