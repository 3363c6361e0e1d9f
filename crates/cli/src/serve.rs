//! `lacuna coordinator`.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use lacuna_control::timing::Timing;
use lacuna_coordinator::ensemble::{self, Ensemble, Part};
use lacuna_coordinator::{Options, Security, Service, StartError};
use lacuna_spec::units::parse_duration;
use lacuna_types::exit;
use tracing::info;

use crate::connect::parse_time;
use crate::{Coded, init_logs, runtime};

/// Settings of the service.
#[derive(Args, Debug)]
pub struct CoordinatorArgs {
    /// Address to listen on; others than loopback need tokens or certificates.
    #[arg(long, default_value = "127.0.0.1:7070")]
    listen: SocketAddr,

    /// Folder of the state file; by default `lacuna` in $XDG_STATE_HOME or ~/.local/state.
    #[arg(long, value_name = "FOLDER")]
    state: Option<PathBuf>,

    /// File of the tokens that let callers in (`lacuna token new --add-to FILE`); read again when
    /// it changes.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// Folder with `cert.pem` and `key.pem`, and with `ca.pem` for callers with certificates
    /// (`lacuna tls init`).
    #[arg(long, value_name = "FOLDER")]
    tls_dir: Option<PathBuf>,

    /// Waits as on one machine: changes of the group come at once instead of being gathered, which
    /// is also done on a loopback address.
    #[arg(long)]
    local: bool,

    /// Endpoints of etcd, with commas: several coordinators share their state there, and one of
    /// them leads.
    #[arg(long, value_name = "URLS", value_delimiter = ',')]
    etcd: Vec<String>,

    /// What the keys of these coordinators begin with.
    #[arg(long, value_name = "PREFIX", default_value = "/lacuna", requires = "etcd")]
    etcd_prefix: String,

    /// Folder with `ca.pem`, and with `cert.pem` and `key.pem` where etcd wants a certificate.
    #[arg(long, value_name = "FOLDER", requires = "etcd")]
    etcd_tls_dir: Option<PathBuf>,

    /// How long nobody leads when the leader is gone without a word.
    #[arg(
        long,
        value_name = "TIME",
        default_value = "10s",
        value_parser = parse_time,
        requires = "etcd"
    )]
    etcd_lease: Duration,

    /// Address that clients and workers reach this coordinator at, where it is not the one that it
    /// listens on.
    #[arg(long, value_name = "URL", requires = "etcd")]
    advertise_url: Option<String>,

    /// Collector of OpenTelemetry that metrics are pushed to over OTLP/gRPC, like
    /// http://127.0.0.1:4317; headers and attributes come from the `OTEL_` variables.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT", value_name = "URL")]
    otlp: Option<String>,

    /// How often metrics are pushed.
    #[arg(long, default_value = "15s", value_name = "TIME", value_parser = parse_time)]
    otlp_every: Duration,

    /// Change one wait of the protocol, like `lease=5s` or `failure_window=200ms`;
    /// docs/operations.md lists them.
    #[arg(long = "set", value_name = "WAIT=TIME")]
    waits: Vec<String>,
}

/// Changes waits as the command line says.
fn set_waits(timing: &mut Timing, waits: &[String]) -> Result<(), String> {
    for wait in waits {
        let (name, value) =
            wait.split_once('=').ok_or_else(|| format!("`--set {wait}`: expected WAIT=TIME"))?;
        let ms = value.strip_suffix("ms").and_then(|n| n.parse().ok()).map(Duration::from_millis);
        let value = match ms {
            Some(time) => time,
            None => parse_duration(value).map_err(|err| format!("`--set {wait}`: {err}"))?,
        };
        timing.set(name, value).map_err(|err| format!("`--set {wait}`: {err}"))?;
    }
    Ok(())
}

/// Returns where the state file stands if nobody says otherwise.
pub fn default_state() -> PathBuf {
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("."), PathBuf::from);
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from);
    state.unwrap_or_else(|| home.join(".local/state")).join("lacuna")
}

/// Returns the waits where nobody sets them. Whoever reaches a loopback address is on this machine,
/// or behind somebody who passes calls on, where silence may still be the network's.
fn usual_waits(local: bool, listen: SocketAddr) -> Timing {
    let (cluster, here) = (Timing::cluster(), Timing::one_machine());
    match (local, listen.ip().is_loopback()) {
        (true, _) => here,
        (false, true) => Timing { disjoint: cluster.disjoint, ..here },
        (false, false) => cluster,
    }
}

/// Serves until a signal.
pub fn coordinator(args: CoordinatorArgs) -> anyhow::Result<u8> {
    init_logs("info");
    let mut timing = usual_waits(args.local, args.listen);
    if let Err(why) = lacuna_api::raise_open_files() {
        info!("{why}");
    }
    set_waits(&mut timing, &args.waits).map_err(|text| Coded::error(exit::USAGE, text))?;
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        let security = Security { tokens: args.token_file, tls: args.tls_dir };
        let state = args.state.unwrap_or_else(default_state);
        let options = Options { state, timing, security };
        let push = pushing(args.otlp.as_deref(), args.otlp_every)?;
        if !args.etcd.is_empty() {
            let mut signals = StopSignals::new();
            let ensemble = Ensemble {
                endpoints: args.etcd,
                tls: args.etcd_tls_dir,
                prefix: args.etcd_prefix,
                url: args.advertise_url,
                lease: args.etcd_lease,
            };
            let news = |part| match part {
                Part::Follows(url) => println!("listening on {url}"),
                // Whoever started it may have read the first line only.
                Part::Leads(url) => drop(writeln!(std::io::stdout(), "leading at {url}")),
            };
            let stop = async move { signals.next().await };
            let served = ensemble::serve(args.listen, options, ensemble, stop, news, push);
            served.await.map_err(coded)?;
            info!("stopped; another coordinator leads, or will");
            return Ok(exit::OK);
        }
        let mut signals = StopSignals::new();
        let opened = tokio::select! {
            opened = Service::open(args.listen, options) => opened,
            () = signals.next() => return Ok(exit::OK),
        };
        let service = push(opened.map_err(coded)?);
        println!("listening on {}", service.url());
        service.serve(async move { signals.next().await }).await.map_err(coded)?;
        info!("stopped; runs and workers go on when a coordinator is back");
        Ok(exit::OK)
    });
    // A thread that waits for a file system which does not answer does not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(5));
    ended
}

/// Makes what has a service push its metrics, where somebody wants them.
#[cfg(feature = "otlp")]
fn pushing(
    to: Option<&str>,
    every: Duration,
) -> anyhow::Result<impl FnOnce(Service) -> Service + use<>> {
    let env = |name: &str| std::env::var(name).ok();
    let otlp = to
        .filter(|endpoint| !endpoint.is_empty())
        .map(|endpoint| lacuna_coordinator::Otlp::new(endpoint, every, env))
        .transpose()
        .map_err(|err| Coded::error(exit::USAGE, lacuna_checkpoint::chain(&err)))?;
    Ok(|service: Service| match otlp {
        Some(otlp) => service.with_otlp(otlp),
        None => service,
    })
}

/// Says that nothing is pushed, where somebody wants metrics: this build cannot.
#[cfg(not(feature = "otlp"))]
fn pushing(
    to: Option<&str>,
    _every: Duration,
) -> anyhow::Result<impl FnOnce(Service) -> Service + use<>> {
    if to.is_some() {
        tracing::warn!("no metrics are pushed: this build lacks the feature `otlp`");
    }
    Ok(|service: Service| service)
}

/// Gives a start error its exit code.
pub fn coded(err: StartError) -> anyhow::Error {
    let code = match &err {
        StartError::Door(_) | StartError::Timing(_) | StartError::Ensemble(_) => exit::USAGE,
        StartError::State { .. } | StartError::Store(_) => exit::IO,
        // A supervisor starts it again, as one of the others.
        StartError::LostLead => exit::DRAINED,
        StartError::Bind { .. } | StartError::InUse { .. } | StartError::Serve(_) => exit::FAILED,
    };
    Coded::error(code, lacuna_checkpoint::chain(&err))
}

/// The signals that stop a command in order.
pub struct StopSignals {
    term: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl StopSignals {
    /// Takes the signals over.
    pub fn new() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        let install = |kind| signal(kind).expect("the runtime handles signals");
        StopSignals {
            term: install(SignalKind::terminate()),
            interrupt: install(SignalKind::interrupt()),
        }
    }

    /// Waits for the next one.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joiners_are_waited_for_where_they_come_from_elsewhere() {
        let of = |local, listen: &str| usual_waits(local, listen.parse().unwrap());
        assert_eq!(of(false, "10.0.0.1:7070"), Timing::cluster());
        assert_eq!(of(true, "10.0.0.1:7070"), Timing::one_machine());
        let here = of(false, "127.0.0.1:7070");
        assert_eq!(here.join_window, Timing::one_machine().join_window);
        assert_eq!(here.voluntary_gap, Timing::one_machine().voluntary_gap);
        assert_eq!(here.disjoint, Timing::cluster().disjoint);
        assert_eq!(here.problems(), Vec::<String>::new());
    }

    #[test]
    fn waits_are_set_by_name_and_mistakes_are_named() {
        let mut timing = Timing::cluster();
        let set = |timing: &mut Timing, wait: &str| set_waits(timing, &[wait.to_string()]);
        set(&mut timing, "failure_window=50ms").unwrap();
        set(&mut timing, "lease=5s").unwrap();
        assert_eq!(timing.failure_window, Duration::from_millis(50));
        assert_eq!(timing.lease, Duration::from_secs(5));
        for bad in ["lease", "lease=5", "leash=5s"] {
            assert!(set(&mut timing, bad).unwrap_err().contains(bad), "{bad}");
        }
    }
}
