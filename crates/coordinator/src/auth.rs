//! Who may come in: addresses, tokens, certificates, and what each role may ask for.
//!
//! On loopback everybody may do everything. Any other address needs a file of tokens, or a folder
//! of TLS files with an authority for clients. A caller's role is that of its token, or that in its
//! certificate; [`needed`] says which one a path asks for.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use lacuna_api::error::{Reason, explained, status};
use lacuna_api::tls;
use tonic::transport::server::TlsConnectInfo;
use tonic::transport::{Certificate, Identity, ServerTlsConfig};

mod certificate;
mod guard;
mod role;
mod tokens;

pub(crate) use guard::{GuardInfo, Guarded, Places, guarded};
pub use role::{NotARole, Role};
use tokens::TokenFile;
pub use tokens::{Bearer, TokenLine, Tokens, TokensError, new_token};

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

    /// Returns the server's side of TLS. Certificates are optional there: who shows none is told so
    /// in words, and probes of health need none.
    pub fn tls_config(&self) -> Result<Option<ServerTlsConfig>, DoorError> {
        let Some(files) = &self.tls else { return Ok(None) };
        let (cert, key) = files.identity()?;
        let config = ServerTlsConfig::new().identity(Identity::from_pem(cert, key));
        Ok(Some(match &files.ca {
            Some(ca) => config.client_ca_root(Certificate::from_pem(ca)).client_auth_optional(true),
            None => config,
        }))
    }

    /// Tells whether a caller may ask for what it asks for, and who it is where that was asked.
    fn admit(&self, request: &Request) -> Result<Option<Bearer>, Refusal> {
        let path = request.uri().path();
        if is_grpc(path) && !speaks_grpc(request) {
            return Err(Refusal::NotGrpc);
        }
        if is_from_elsewhere(request.headers()) {
            return Err(Refusal::Elsewhere);
        }
        if is_deed(path) && !is_asked_for_here(request) {
            return Err(Refusal::Elsewhere);
        }
        let Some(needed) = needed(path) else { return Ok(None) };
        let who = self.who(request)?;
        if who.role.may(needed) {
            Ok(Some(who))
        } else {
            Err(Refusal::Role { has: who.role, needed })
        }
    }

    /// Finds out who a caller is.
    fn who(&self, request: &Request) -> Result<Bearer, Refusal> {
        if !self.is_locked() {
            // Pages of other names that lead here are another site's.
            let name = host_of(request);
            return if name.as_deref().is_none_or(is_local) {
                Ok(Bearer { role: Role::Admin, name: String::new() })
            } else {
                Err(Refusal::Elsewhere)
            };
        }
        let certificate = certified(request);
        if let Some(Ok(bearer)) = certificate {
            return Ok(bearer);
        }
        let Some(tokens) = &self.tokens else {
            return Err(if certificate.is_some() {
                Refusal::NoRole
            } else {
                Refusal::NoCertificate
            });
        };
        let token = token_of(request.headers(), is_grpc(request.uri().path()));
        let token =
            token.ok_or(if certificate.is_some() { Refusal::NoRole } else { Refusal::NoToken })?;
        tokens.bearer_of(&token).ok_or(Refusal::WrongToken)
    }
}

/// Tells whether a path is one of gRPC's.
fn is_grpc(path: &str) -> bool {
    path.starts_with("/lacuna.") || path.starts_with("/grpc.")
}

/// Tells whether a request is one that no page of another site can make a browser send.
fn speaks_grpc(request: &Request) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    request.method() == Method::POST
        && request.version() == Version::HTTP_2
        && kind.is_some_and(|kind| kind.starts_with("application/grpc"))
}

/// Tells whether a browser says that a page of another site asks.
fn is_from_elsewhere(headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
    let mode = headers.get("sec-fetch-mode").map(HeaderValue::as_bytes);
    // A link from elsewhere may be followed; what a page fetches may not come from elsewhere.
    matches!(site, Some(b"cross-site" | b"same-site")) && mode != Some(b"navigate")
}

/// Tells whether a path is that of a button.
fn is_deed(path: &str) -> bool {
    path.starts_with("/runs/") && path.contains("/do/")
}

/// Tells whether a form was sent by a page of this service: a browser says so, and sends a password
/// along whoever made the form.
fn is_asked_for_here(request: &Request) -> bool {
    let of = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok());
    let site = of("sec-fetch-site").is_none_or(|site| site == "same-origin");
    let Some(origin) = of("origin") else { return site };
    let here = authority_of(request);
    site && origin.split_once("://").is_some_and(|(_, name)| Some(name) == here.as_deref())
}

/// Returns the name that a caller believes to talk to, with the port.
fn authority_of(request: &Request) -> Option<String> {
    let of_uri = request.uri().authority().map(|authority| authority.as_str().to_string());
    let of_header = || request.headers().get(header::HOST)?.to_str().ok().map(str::to_string);
    of_uri.or_else(of_header)
}

/// Returns the name that a caller believes to talk to, without the port.
fn host_of(request: &Request) -> Option<String> {
    let name = authority_of(request)?;
    let without_port = match name.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => &name,
    };
    Some(without_port.trim_matches(['[', ']']).to_string())
}

/// Tells whether a name means this machine, whoever resolves it.
fn is_local(name: &str) -> bool {
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
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
    #[error("this is gRPC: a POST over HTTP/2 with the content type application/grpc")]
    NotGrpc,
    #[error("a page of another site asks, or this address has a name that is not this machine's")]
    Elsewhere,
    #[error("this needs the role `{needed}`, and the caller has the role `{has}`")]
    Role { has: Role, needed: Role },
}

/// Reads the certificate that a caller has shown, if it has.
fn certified(request: &Request) -> Option<Result<Bearer, Refusal>> {
    let info = request.extensions().get::<TlsConnectInfo<GuardInfo>>()?;
    let certs = info.peer_certs()?;
    let bearer = certs.first().and_then(|der| certificate::bearer_in(der));
    Some(bearer.ok_or(Refusal::NoRole))
}

/// Returns the token of a request: a bearer's, or on pages the password of a browser, which sends
/// it by itself and so must not have it count for more.
fn token_of(headers: &HeaderMap, is_grpc: bool) -> Option<String> {
    use base64::Engine as _;
    let text = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (kind, rest) = text.split_once(' ')?;
    if kind.eq_ignore_ascii_case("bearer") {
        return Some(rest.trim().to_string());
    }
    if is_grpc || !kind.eq_ignore_ascii_case("basic") {
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
        _ if is_deed(path) => Some(Role::Submit),
        "/lacuna.v1.RunService/GetRun"
        | "/lacuna.v1.RunService/ListRuns"
        | "/lacuna.v1.RunService/WatchRun"
        | "/lacuna.v1.RunService/ValidateRun"
        | "/lacuna.v1.RunService/DiffRuns"
        | "/lacuna.v1.RunService/GetMetrics"
        | "/lacuna.v1.RunService/StreamLogs"
        | "/lacuna.v1.CheckpointService/ListCheckpoints"
        | "/lacuna.v1.CheckpointService/GetManifest"
        | "/lacuna.v1.AdminService/GetInfo"
        | "/lacuna.v1.AdminService/ListBans"
        | "/lacuna.v1.AdminService/ListWorkers" => Some(Role::View),
        "/lacuna.v1.RunService/CreateRun"
        | "/lacuna.v1.RunService/StopRun"
        | "/lacuna.v1.RunService/CancelRun"
        | "/lacuna.v1.RunService/UpdateRun"
        | "/lacuna.v1.CheckpointService/PinCheckpoint"
        | "/lacuna.v1.CheckpointService/VerifyCheckpoint"
        | "/lacuna.v1.RunService/ScaleRun"
        | "/lacuna.v1.RunService/RequestCheckpoint" => Some(Role::Submit),
        "/lacuna.v1.WorkerService/Session" | "/lacuna.v1.WorkerService/Agent" => Some(Role::Worker),
        // What is not known to need less needs most.
        _ if path.starts_with("/lacuna.") => Some(Role::Admin),
        _ => Some(Role::View),
    }
}

/// Lets a request through, or answers it with a refusal that a client understands. Either answer
/// carries the id that the request came with, or a new one, which is in the log.
pub(crate) async fn check(
    State(door): State<Arc<Door>>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = request_id(request.headers());
    let path = request.uri().path().to_string();
    let guard = guard_of(&request);
    let mut response = match door.admit(&request) {
        Ok(who) => {
            // Who asks for health only has shown nothing, and must not stay for it.
            if let Some(guard) = guard.as_ref().filter(|_| who.is_some()) {
                guard.admit();
            }
            if let Some(who) = &who {
                request.extensions_mut().insert(Viewer(who.clone()));
            }
            if let Some(Bearer { role, name }) = who.filter(|who| acts(&path, who.role)) {
                let peer = peer_of(guard);
                tracing::info!(path, request_id = ?id, %role, name, ?peer, "asked");
            }
            with_reason(next.run(request).await)
        }
        Err(refusal) => {
            let shown: String = path.chars().take(SHOWN_MAX).collect();
            let peer = peer_of(guard);
            tracing::info!(path = shown, request_id = ?id, ?peer, %refusal, "refused");
            refuse(&request, &refusal)
        }
    };
    tracing::debug!(path, request_id = ?id, status = response.status().as_u16(), "answered");
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Gives a refusal in gRPC a reason that came about before a service saw the call.
fn with_reason(mut response: Response) -> Response {
    let refusal = tonic::Status::from_header_map(response.headers());
    if let Some(status) = refusal.as_ref().and_then(explained) {
        // Fails only for text that is no header, and tonic encodes it.
        let _ = status.add_header(response.headers_mut());
    }
    response
}

/// Who looks at a page.
#[derive(Clone, Debug)]
pub(crate) struct Viewer(Bearer);

impl Viewer {
    /// Tells whether buttons do something for this one.
    pub fn may_act(&self) -> bool {
        self.0.role.may(Role::Submit)
    }

    /// Returns the name in the file of tokens, or in the certificate.
    pub fn name(&self) -> &str {
        &self.0.name
    }
}

impl<S: Sync> axum::extract::FromRequestParts<S> for Viewer {
    type Rejection = StatusCode;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, StatusCode> {
        parts.extensions.get::<Viewer>().cloned().ok_or(StatusCode::FORBIDDEN)
    }
}

/// Longest piece of a path in the log.
const SHOWN_MAX: usize = 200;

/// Tells whether a request changes something, and is not one of the many of workers.
fn acts(path: &str, role: Role) -> bool {
    role != Role::Worker && matches!(needed(path), Some(Role::Submit | Role::Admin))
}

fn guard_of(request: &Request) -> Option<GuardInfo> {
    let extensions = request.extensions();
    let tls = || extensions.get::<TlsConnectInfo<GuardInfo>>().map(|info| info.get_ref().clone());
    extensions.get::<GuardInfo>().cloned().or_else(tls)
}

fn peer_of(guard: Option<GuardInfo>) -> Option<SocketAddr> {
    guard.and_then(|guard| guard.tcp.remote_addr())
}

/// Header of a request's id.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest id that a caller may give.
const REQUEST_ID_MAX: usize = 64;

/// Returns the id that a request came with, if it is a plain one, or a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let is_plain = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        (1..=REQUEST_ID_MAX).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic)
    };
    headers.get(REQUEST_ID).filter(is_plain).cloned().unwrap_or_else(|| {
        let mut bytes = [0u8; 8];
        getrandom::fill(&mut bytes).expect("the system has a random source");
        let text = format!("{:016x}", u64::from_ne_bytes(bytes));
        HeaderValue::from_str(&text).expect("hexadecimal digits are plain")
    })
}

fn refuse(request: &Request, refusal: &Refusal) -> Response {
    if matches!(refusal, Refusal::NotGrpc) {
        return (StatusCode::UNSUPPORTED_MEDIA_TYPE, format!("{refusal}\n")).into_response();
    }
    let may_not = matches!(refusal, Refusal::Role { .. } | Refusal::Elsewhere);
    if is_grpc(request.uri().path()) {
        let reason = if may_not { Reason::RoleMissing } else { Reason::Unauthenticated };
        return status(reason, refusal.to_string()).into_http();
    }
    if may_not {
        return (StatusCode::FORBIDDEN, format!("{refusal}\n")).into_response();
    }
    let ask = HeaderValue::from_static("Basic realm=\"lacuna: any name, the token as password\"");
    let text = format!("{refusal}\n");
    (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, ask)], text).into_response()
}

#[cfg(test)]
mod tests;
