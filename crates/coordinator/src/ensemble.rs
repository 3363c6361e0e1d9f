//! Several coordinators of which one leads: elected in etcd, with the state there.
//!
//! Each listens. Who does not lead answers `NOT_LEADER` with the leader's address, and tries to
//! become leader once the leader's lease ends. Who leads writes with its key as a condition, so one
//! that was cut off can write nothing more, whatever it believes; it ends when it has not renewed
//! its lease for three quarters of its time, and a supervisor starts it again as one of the others.
//! Training does not wait for any of this: workers go on, and connect to whoever leads.

use std::future::Future;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lacuna_api::tls::{Credentials, TlsError};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::auth::{self, Door};
use crate::etcd::{Election, Etcd, EtcdError, Leadership, OwnThread};
use crate::registry::{FILES_FOLDER, STATE_FILE};
use crate::service::{Options, Service, StartError};
use crate::store::{EtcdStore, StoreError};
use crate::waiting::{self, Standing, Waiting};

/// How often one that does not lead looks whether it may.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Shortest lease: elections inside etcd take about a second.
const LEASE_MIN: Duration = Duration::from_secs(2);

/// An ensemble of coordinators, and this one's place in it.
#[derive(Clone, Debug)]
pub struct Ensemble {
    /// Endpoints of etcd, like `http://127.0.0.1:2379`.
    pub endpoints: Vec<String>,
    /// Folder with `ca.pem`, and with `cert.pem` and `key.pem` where etcd wants a certificate.
    pub tls: Option<PathBuf>,
    /// What the ensemble's keys begin with; another ensemble has another.
    pub prefix: String,
    /// Where clients and workers reach this coordinator; by default the address that it listens on.
    pub url: Option<String>,
    /// How long nobody leads when the leader is gone without a word.
    pub lease: Duration,
}

impl Ensemble {
    /// Refuses settings that cannot work.
    fn check(&self, addr: SocketAddr) -> Result<(), StartError> {
        let wrong = |text: String| Err(StartError::Ensemble(text));
        let is_url = |text: &str| text.starts_with("http://") || text.starts_with("https://");
        for endpoint in &self.endpoints {
            let shown = endpoint.rsplit('@').next().unwrap_or_default();
            if !is_url(endpoint) {
                return wrong(format!(
                    "`--etcd`: `{shown}` begins with neither http:// nor https://"
                ));
            }
            if endpoint.contains('@') {
                let text = format!("`--etcd`: `{shown}` holds a user or a password: remove it");
                return wrong(text);
            }
            match (endpoint.starts_with("https://"), &self.tls) {
                (true, None) => {
                    return wrong(format!("`--etcd`: `{shown}` needs `--etcd-tls-dir`"));
                }
                (false, Some(_)) => {
                    let text = format!("`--etcd-tls-dir`: `{shown}` is spoken to without TLS");
                    return wrong(text);
                }
                _ => {}
            }
        }
        match &self.url {
            Some(url) if !is_url(url) => wrong(format!(
                "`--advertise-url`: `{url}` begins with neither http:// nor https://"
            )),
            None if addr.ip().is_unspecified() => wrong(format!(
                "`--listen {addr}` is not an address to reach: give `--advertise-url`"
            )),
            _ if self.lease < LEASE_MIN => {
                wrong(format!("`--etcd-lease` must be at least {LEASE_MIN:?}"))
            }
            _ => Ok(()),
        }
    }
}

/// What becomes of a coordinator of an ensemble.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// It listens at this address, and somebody else may lead.
    Follows(String),
    /// It leads from here on.
    Leads(String),
}

/// Serves as one of an ensemble until `shutdown` completes; says to `news` what it is. `adorn` adds
/// to the service what a leader has.
///
/// # Errors
/// As [`Service::open`] and [`Service::serve`]; [`StartError::LostLead`] where another one leads by
/// now, or may soon.
pub async fn serve(
    addr: SocketAddr,
    options: Options,
    ensemble: Ensemble,
    shutdown: impl Future<Output = ()> + Send,
    mut news: impl FnMut(Part),
    adorn: impl FnOnce(Service) -> Service,
) -> Result<(), StartError> {
    ensemble.check(addr)?;
    let door = Arc::new(Door::new(addr, &options.security)?);
    let bind = |source| StartError::Bind { addr, source };
    let listener = StdListener::bind(addr).map_err(bind)?;
    listener.set_nonblocking(true).map_err(bind)?;
    let here = listener.local_addr().map_err(bind)?;
    let scheme = if door.is_encrypted() { "https" } else { "http" };
    let url = ensemble.url.clone().unwrap_or_else(|| format!("{scheme}://{here}"));
    let etcd = Etcd::new(&ensemble.endpoints, tls_of(&ensemble)?.as_ref())?;
    news(Part::Follows(url.clone()));
    let mut shutdown = std::pin::pin!(shutdown);

    let (leader, known) = watch::channel(Standing::Follows(String::new()));
    let waiting = Waiting::start(waiting::same(&listener).map_err(bind)?, door, known);
    let key = format!("{}/leader", ensemble.prefix.trim_end_matches('/'));
    let won = tokio::select! {
        lead = win(&etcd, &key, &url, ensemble.lease, &leader) => Some(lead),
        () = &mut shutdown => None,
    };
    let Some(lead) = won else { return Ok(()) };

    leader.send_replace(Standing::Starting);
    info!(url, etcd = ?ensemble.endpoints, "elected: this coordinator leads");
    // On a thread of its own, until dropped: whatever holds the service up, the lease is renewed.
    let keeper = OwnThread::start("lease")?;
    let (lost, mut gone) = oneshot::channel();
    keeper.handle().spawn(keep(etcd.on(&keeper)?, lead.clone(), lost));
    let opened = tokio::select! {
        opened = open(&listener, options, &etcd, &ensemble, &lead) => Some(opened),
        () = &mut shutdown => None,
        _ = &mut gone => Some(Err(StartError::LostLead)),
    };
    waiting.end().await;
    let ended = match opened {
        Some(Ok(service)) => {
            news(Part::Leads(url));
            tokio::select! {
                ended = adorn(service).serve(shutdown) => ended,
                _ = gone => Err(StartError::LostLead),
            }
        }
        Some(Err(err)) => Err(err),
        None => Ok(()),
    };
    drop(keeper);
    // Whoever is next need not wait for the lease to end; where this fails, it does.
    let _ = etcd.revoke(lead.lease).await;
    match ended {
        // A write was refused, or not done in time, before the lease was missed: the same.
        Err(StartError::Store(StoreError::Etcd(error))) => {
            warn!(%error, "this coordinator cannot lead on");
            Err(StartError::LostLead)
        }
        ended => ended,
    }
}

fn tls_of(ensemble: &Ensemble) -> Result<Option<tonic::transport::ClientTlsConfig>, StartError> {
    let read = |dir: &PathBuf| Credentials::read(None, Some(dir));
    let credentials: Result<Option<Credentials>, TlsError> =
        ensemble.tls.as_ref().map(read).transpose();
    let credentials = credentials.map_err(auth::DoorError::from)?;
    Ok(credentials.and_then(|credentials| credentials.tls_config()))
}

/// Tries to become leader until it is one; tells followers who leads meanwhile.
async fn win(
    etcd: &Etcd,
    key: &str,
    url: &str,
    lease: Duration,
    leader: &watch::Sender<Standing>,
) -> Leadership {
    let mut failing = false;
    loop {
        match etcd.campaign(key, url, lease).await {
            Ok(Election::Won(lead)) => return lead,
            Ok(Election::Lost(who)) => {
                failing = false;
                let now = Standing::Follows(who.clone());
                if leader.send_if_modified(|known| std::mem::replace(known, now.clone()) != now) {
                    info!(leader = who, "this coordinator follows");
                }
            }
            Err(error) => {
                if !failing {
                    warn!(%error, "no election; trying on");
                }
                failing = true;
                leader.send_replace(Standing::Follows(String::new()));
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Keeps the lease; `lost` is dropped when it may be gone, and before anybody else can have it.
async fn keep(etcd: Etcd, lead: Leadership, _lost: oneshot::Sender<()>) {
    let lease = lead.ttl;
    let mut renewed = Instant::from_std(lead.since);
    loop {
        tokio::time::sleep(lease / 4).await;
        let asked = Instant::now();
        // A call that hangs must not hide that time is up.
        let call = tokio::time::timeout_at(renewed + lease * 3 / 4, etcd.keep(lead.lease));
        match call.await {
            Ok(Ok(true)) => renewed = asked,
            Ok(Ok(false)) => {
                warn!("the lease is gone: another coordinator may lead");
                return;
            }
            Ok(Err(error)) => warn!(%error, "the lease was not renewed; trying again"),
            Err(_) => {
                warn!(?lease, "the lease was not renewed in time: another coordinator may lead");
                return;
            }
        }
    }
}

/// Takes the state over and opens the service on it.
async fn open(
    listener: &StdListener,
    mut options: Options,
    etcd: &Etcd,
    ensemble: &Ensemble,
    lead: &Leadership,
) -> Result<Service, StartError> {
    // A folder of its own: what lies there is made anew, and no state of a coordinator alone.
    options.state = options.state.join("of-etcd");
    // Copies of files that another leader may have written on; they are fetched anew.
    let _ = std::fs::remove_dir_all(options.state.join(FILES_FOLDER));
    let addr = listener.local_addr();
    let bind = |source| StartError::Bind { addr: SocketAddr::from(([0, 0, 0, 0], 0)), source };
    let addr = addr.map_err(bind)?;
    let listener = waiting::same(listener).map_err(|source| StartError::Bind { addr, source })?;
    let (etcd, prefix, lead) = (etcd.clone(), ensemble.prefix.clone(), lead.clone());
    Service::open_on(listener, options, move |folder| {
        let store = EtcdStore::open(&folder.join(STATE_FILE), etcd, &prefix, lead)?;
        Ok(Box::new(store))
    })
    .await
}

impl From<EtcdError> for StartError {
    fn from(err: EtcdError) -> Self {
        StartError::Store(err.into())
    }
}
