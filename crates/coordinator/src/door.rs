//! Who may come in: addresses, tokens, certificates, and what each role may ask for.
//!
//! On loopback everybody may do everything. Any other address needs a file of tokens, or a folder
//! of TLS files with an authority for clients. A caller's role is that of its token, or that in its
//! certificate; [`needed`] says which one a path asks for.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use lacuna_api::error::{Reason, status};
use lacuna_api::tls;
use tonic::transport::server::{TcpConnectInfo, TlsConnectInfo};
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

mod certificate;
mod guard;
mod role;
mod tokens;

pub(crate) use guard::guarded;
pub use role::{NotARole, Role};
use tokens::TokenFile;
pub use tokens::{TokenLine, Tokens, TokensError, new_token};

/// How callers prove who they are.
#[derive(Clone, Debug, Default)]
pub struct Security {
    /// File of tokens, one `role:sha256` a line.
    pub tokens: Option<PathBuf>,
    /// Folder with `cert.pem`, `key.pem` and, for clients with certificates, `ca.pem`.
    pub tls: Option<PathBuf>,
}

/// A door that cannot be opened as it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// Anybody on the network could use the service.
    #[error(
        "refusing to listen on {addr}: without tokens or TLS the service is open to everybody who \
         can reach it; give it `--token-file FILE` (`lacuna token new`) or `--tls-dir FOLDER` with \
         an authority for clients (`lacuna tls init`), or listen on a loopback address"
    )]
    Exposed {
        /// The address.
        addr: SocketAddr,
    },
    /// The tokens cannot be used.
    #[error("tokens in `{}`", path.display())]
    Tokens {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: TokensError,
    },
    /// A TLS file cannot be used.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
}

/// What is asked of every caller.
pub(crate) struct Door {
    tokens: Option<TokenFile>,
    tls: Option<tls::TlsFiles>,
    /// Whether callers may show a certificate.
    certificates: bool,
}

impl Door {
    /// Reads tokens and TLS files, and refuses an address that they do not protect.
    pub fn new(addr: SocketAddr, security: &Security) -> Result<Self, DoorError> {
        let tokens = security.tokens.as_ref().map(|path| open_tokens(path)).transpose()?;
        let tls = security.tls.as_ref().map(|dir| tls::TlsFiles::read(dir)).transpose()?;
        if let Some(files) = &tls {
            files.identity()?;
        }
        let certificates = tls.as_ref().is_some_and(|tls| tls.ca.is_some());
        if !addr.ip().is_loopback() && tokens.is_none() && !certificates {
            return Err(DoorError::Exposed { addr });
        }
        Ok(Door { tokens, tls, certificates })
    }

    /// Tells whether callers must prove who they are.
    pub fn is_locked(&self) -> bool {
        self.tokens.is_some() || self.certificates
    }

    /// Tells whether what is said is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// Returns the server's side of TLS. Certificates are optional where there are tokens.
    pub fn tls_config(&self) -> Result<Option<ServerTlsConfig>, DoorError> {
        let Some(files) = &self.tls else { return Ok(None) };
        let (cert, key) = files.identity()?;
        let config = ServerTlsConfig::new().identity(Identity::from_pem(cert, key));
        Ok(Some(match &files.ca {
            Some(ca) => config
                .client_ca_root(Certificate::from_pem(ca))
                .client_auth_optional(self.tokens.is_some()),
            None => config,
        }))
    }

    /// Finds the role of a caller.
    fn role_of(&self, request: &Request) -> Result<Role, Refusal> {
        if !self.is_locked() {
            return Ok(Role::Admin);
        }
        if let Some(role) = certified(request) {
            return role;
        }
        let Some(tokens) = &self.tokens else { return Err(Refusal::NoCertificate) };
        let token = bearer(request.headers()).ok_or(Refusal::NoToken)?;
        tokens.role_of(&token).ok_or(Refusal::WrongToken)
    }
}

fn open_tokens(path: &Path) -> Result<TokenFile, DoorError> {
    TokenFile::open(path).map_err(|source| DoorError::Tokens { path: path.to_path_buf(), source })
}

/// Why a caller is not let in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error("no token: give one with `--token-file` or LACUNA_TOKEN_FILE")]
    NoToken,
    #[error("the token is not one of this coordinator's")]
    WrongToken,
    #[error("no certificate: give one with `--tls-dir` or LACUNA_TLS_DIR")]
    NoCertificate,
    #[error("the certificate names no role of Lacuna (view, submit, worker, admin)")]
    NoRole,
    #[error("this needs the role `{needed}`, and the caller has the role `{has}`")]
    Role { has: Role, needed: Role },
}

/// Reads the role in the certificate that a caller has shown, if it has.
fn certified(request: &Request) -> Option<Result<Role, Refusal>> {
    let info = request.extensions().get::<TlsConnectInfo<TcpConnectInfo>>()?;
    let certs = info.peer_certs()?;
    let role = certs.first().and_then(|der| certificate::role_in(der));
    Some(role.ok_or(Refusal::NoRole))
}

/// Returns the token of a request: a bearer's, or the password of a browser.
fn bearer(headers: &HeaderMap) -> Option<String> {
    use base64::Engine as _;
    let text = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (kind, rest) = text.split_once(' ')?;
    if kind.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().to_string());
    }
    if !kind.eq_ignore_ascii_case("basic") {
        return None;
    }
    let plain = base64::engine::general_purpose::STANDARD.decode(rest.trim()).ok()?;
    let plain = String::from_utf8(plain).ok()?;
    plain.split_once(':').map(|(_, password)| password.to_string())
}

/// The role that a path asks for; `None` where everybody may ask.
pub(crate) fn needed(path: &str) -> Option<Role> {
    const HEALTH: &str = "/grpc.health.v1.Health/";
    match path {
        "/healthz" | "/readyz" => None,
        _ if path.starts_with(HEALTH) => None,
        "/lacuna.v1.RunService/GetRun"
        | "/lacuna.v1.RunService/ListRuns"
        | "/lacuna.v1.RunService/WatchRun"
        | "/lacuna.v1.AdminService/GetInfo"
        | "/lacuna.v1.AdminService/ListWorkers" => Some(Role::View),
        "/lacuna.v1.RunService/CreateRun"
        | "/lacuna.v1.RunService/StopRun"
        | "/lacuna.v1.RunService/RequestCheckpoint" => Some(Role::Submit),
        "/lacuna.v1.WorkerService/Session" | "/lacuna.v1.WorkerService/Agent" => Some(Role::Worker),
        // What is not known to need less needs most.
        _ if path.starts_with("/lacuna.") => Some(Role::Admin),
        _ => Some(Role::View),
    }
}

/// Lets a request through, or answers it with a refusal that a client understands.
pub(crate) async fn check(
    State(door): State<Arc<Door>>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(needed) = needed(request.uri().path()) else { return next.run(request).await };
    let refusal = match door.role_of(&request) {
        Ok(has) if has.may(needed) => {
            request.extensions_mut().insert(has);
            return next.run(request).await;
        }
        Ok(has) => Refusal::Role { has, needed },
        Err(refusal) => refusal,
    };
    tracing::info!(path = request.uri().path(), %refusal, "refused");
    refuse(&request, &refusal)
}

fn refuse(request: &Request, refusal: &Refusal) -> Response {
    let is_role = matches!(refusal, Refusal::Role { .. });
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    if kind.is_some_and(|kind| kind.starts_with("application/grpc")) {
        let reason = if is_role { Reason::RoleMissing } else { Reason::Unauthenticated };
        return status(reason, refusal.to_string()).into_http();
    }
    if is_role {
        return (StatusCode::FORBIDDEN, format!("{refusal}\n")).into_response();
    }
    let ask = HeaderValue::from_static("Basic realm=\"lacuna: any name, the token as password\"");
    let text = format!("{refusal}\n");
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, ask)], text).into_response()
}

#[cfg(test)]
mod tests;
