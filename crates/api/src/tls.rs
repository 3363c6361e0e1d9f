//! TLS files and tokens as they stand on disk: a folder for each party, as `lacuna tls init` makes
//! them.

use std::fmt;
use std::path::{Path, PathBuf};

use tonic::transport::{Certificate, ClientTlsConfig, Identity};
use x509_parser::x509::X509Version;

/// Longest token: more than any that is made, less than would fill a header.
const TOKEN_BYTES_MAX: usize = 1024;

/// A certificate's file.
const CERT: &str = "cert.pem";
/// A private key's file.
const KEY: &str = "key.pem";
/// The authority's certificate.
const CA: &str = "ca.pem";

/// A file of TLS or a token that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("failed to read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The folder lacks a file.
    #[error("`{}` has no {CERT} and {KEY}: make them with `lacuna tls init`", dir.display())]
    NoIdentity {
        /// The folder.
        dir: PathBuf,
    },
    /// A certificate is none that TLS takes.
    #[error("`{}` is not a certificate that can be used: {why}", path.display())]
    NotACertificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The time of a certificate is over, or has not come.
    #[error("the certificate `{}` is valid from {from} to {to}: make another one", path.display())]
    OutOfDate {
        /// The file.
        path: PathBuf,
        /// From when.
        from: String,
        /// Until when.
        to: String,
    },
    /// The folder has nothing to go by.
    #[error("`{}` has no {CA}: make it with `lacuna tls init`", dir.display())]
    NoAuthority {
        /// The folder.
        dir: PathBuf,
    },
    /// The file of a token holds something else.
    #[error(
        "`{}` holds no token: one line without spaces, as `lacuna token new` prints it",
        path.display()
    )]
    NotAToken {
        /// The file.
        path: PathBuf,
    },
}

/// What a folder of TLS files holds.
#[derive(Clone)]
pub struct TlsFiles {
    dir: PathBuf,
    /// The authority's certificate, PEM.
    pub ca: Option<Vec<u8>>,
    own: Option<(Vec<u8>, Vec<u8>)>,
}

impl fmt::Debug for TlsFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsFiles").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl TlsFiles {
    /// Reads a folder: `ca.pem`, and `cert.pem` with `key.pem`, where they are there.
    pub fn read(dir: &Path) -> Result<Self, TlsError> {
        let file = |name: &str| {
            let path = dir.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(source) => Err(TlsError::Read { path, source }),
            }
        };
        let own = file(CERT)?.zip(file(KEY)?);
        if let Some((cert, _)) = &own {
            check_certificate(&dir.join(CERT), cert)?;
        }
        Ok(TlsFiles { dir: dir.to_path_buf(), ca: file(CA)?, own })
    }

    /// Returns the certificate and the key of whoever has the folder, PEM.
    pub fn identity(&self) -> Result<(&[u8], &[u8]), TlsError> {
        let own = self.own.as_ref().map(|(cert, key)| (&cert[..], &key[..]));
        own.ok_or_else(|| TlsError::NoIdentity { dir: self.dir.clone() })
    }
}

/// How a client proves who it is, and knows whom it talks to.
#[derive(Clone, Default)]
pub struct Credentials {
    token: Option<String>,
    tls: Option<TlsFiles>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        f.debug_struct("Credentials").field("token", &token).field("tls", &self.tls).finish()
    }
}

impl Credentials {
    /// Reads the file of a token, and a folder with the authority's certificate and perhaps an own.
    ///
    /// # Errors
    /// A file cannot be read or is none of its kind.
    pub fn read(token: Option<&Path>, tls: Option<&Path>) -> Result<Self, TlsError> {
        let token = token.map(read_token).transpose()?;
        let tls = tls.map(TlsFiles::read).transpose()?;
        if let Some(files) = tls.as_ref().filter(|files| files.ca.is_none()) {
            return Err(TlsError::NoAuthority { dir: files.dir.clone() });
        }
        Ok(Credentials { token, tls })
    }

    /// Tells whether there is anything to prove oneself with.
    pub fn is_empty(&self) -> bool {
        self.token.is_none() && self.tls.is_none()
    }

    pub(crate) fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Returns what a channel needs to speak TLS, where there are files for it.
    pub fn tls_config(&self) -> Option<ClientTlsConfig> {
        let files = self.tls.as_ref()?;
        let ca = files.ca.as_ref().map(Certificate::from_pem);
        let config =
            ca.into_iter().fold(ClientTlsConfig::new(), |config, ca| config.ca_certificate(ca));
        Some(match files.identity() {
            Ok((cert, key)) => config.identity(Identity::from_pem(cert, key)),
            Err(_) => config,
        })
    }
}

/// Refuses a certificate that the other side will refuse: there the reason is lost on the way.
fn check_certificate(path: &Path, pem: &[u8]) -> Result<(), TlsError> {
    let bad = |why: String| TlsError::NotACertificate { path: path.to_path_buf(), why };
    let (_, pem) = x509_parser::pem::parse_x509_pem(pem).map_err(|err| bad(err.to_string()))?;
    let certificate = pem.parse_x509().map_err(|err| bad(err.to_string()))?;
    if certificate.version() != X509Version::V3 {
        return Err(bad("it is of a version before 3".to_string()));
    }
    let validity = certificate.validity();
    if validity.is_valid() {
        return Ok(());
    }
    let (from, to) = (validity.not_before.to_string(), validity.not_after.to_string());
    Err(TlsError::OutOfDate { path: path.to_path_buf(), from, to })
}

fn read_token(path: &Path) -> Result<String, TlsError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| TlsError::Read { path: path.to_path_buf(), source })?;
    let token = text.trim();
    let is_one = !token.is_empty()
        && token.len() <= TOKEN_BYTES_MAX
        && token.bytes().all(|byte| byte.is_ascii_graphic());
    if is_one {
        Ok(token.to_string())
    } else {
        Err(TlsError::NotAToken { path: path.to_path_buf() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_one_line_and_never_printed() {
        let dir = std::env::temp_dir().join(format!("lacuna-token-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("token");
        std::fs::write(&path, "lacuna_0123\n").unwrap();
        let credentials = Credentials::read(Some(&path), None).unwrap();
        assert_eq!(credentials.token(), Some("lacuna_0123"));
        assert!(!format!("{credentials:?}").contains("0123"));
        for bad in ["", "\n", "two words", "ein Schl\u{fc}ssel"] {
            std::fs::write(&path, bad).unwrap();
            let error = Credentials::read(Some(&path), None).unwrap_err();
            assert!(matches!(error, TlsError::NotAToken { .. }), "{bad:?}: {error}");
        }
        let error = Credentials::read(None, Some(&dir)).unwrap_err();
        assert!(error.to_string().contains("has no ca.pem"), "{error}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
