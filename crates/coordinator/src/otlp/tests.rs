use std::net::SocketAddr;

use lacuna_control::timing::Timing;
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use super::*;
use crate::{Options, Security, Service};

/// A collector that hands on what it gets.
struct Collector(mpsc::Sender<ExportMetricsServiceRequest>);

#[tonic::async_trait]
impl MetricsService for Collector {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        if request.metadata().get("api-key").is_none_or(|key| key != "secret") {
            return Err(Status::unauthenticated("no key"));
        }
        self.0.send(request.into_inner()).await.map_err(|_| Status::unavailable("gone"))?;
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

async fn collector(addr: SocketAddr) -> (SocketAddr, mpsc::Receiver<ExportMetricsServiceRequest>) {
    let listener = TcpListener::bind(addr).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (got, seen) = mpsc::channel(64);
    let service = MetricsServiceServer::new(Collector(got));
    let incoming = TcpIncoming::from(listener);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    (addr, seen)
}

fn env(name: &str) -> Option<String> {
    match name {
        "OTEL_EXPORTER_OTLP_HEADERS" => Some("Api-Key=se%63ret".to_string()),
        "OTEL_RESOURCE_ATTRIBUTES" => Some("cluster=lab, service.name=lacuna-lab".to_string()),
        _ => None,
    }
}

/// A collector that is not there at first is no reason to end, and the last push is at the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_reach_a_collector_that_comes_late() {
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        state: dir.path().to_path_buf(),
        timing: Timing::one_machine(),
        security: Security::default(),
    };
    let every = Duration::from_millis(20);
    let otlp = Otlp::new(&format!("http://{free}"), every, env).unwrap();
    let service = Service::open("127.0.0.1:0".parse().unwrap(), options).await.unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let serve = service.with_otlp(otlp).serve(async { drop(stopped.await) });
    let serving = tokio::spawn(serve);
    let (_, mut seen) = collector(free).await;
    let first = tokio::time::timeout(Duration::from_secs(30), seen.recv()).await.unwrap().unwrap();
    let resource = &first.resource_metrics[0];
    let attributes = &resource.resource.as_ref().unwrap().attributes;
    let shown = format!("{attributes:?}");
    assert!(shown.contains("lacuna-lab") && shown.contains("cluster"), "{shown}");
    let names = |request: &ExportMetricsServiceRequest| -> Vec<String> {
        let scopes = &request.resource_metrics[0].scope_metrics;
        scopes[0].metrics.iter().map(|metric| metric.name.clone()).collect()
    };
    assert!(names(&first).contains(&"lacuna_sessions".to_string()), "{:?}", names(&first));
    stop.send(()).unwrap();
    let drain = async { while seen.recv().await.is_some() {} };
    let (ended, ()) = tokio::join!(serving, async {
        // The collector goes on; what matters is that the service ends beside it.
        let _ = tokio::time::timeout(Duration::from_millis(200), drain).await;
    });
    ended.unwrap().unwrap();
}

#[test]
fn settings_that_cannot_be_used_are_named_and_secrets_are_not() {
    let every = Duration::from_secs(15);
    let endpoint = "http://127.0.0.1:4317";
    let with = |name: &'static str, value: &'static str| {
        move |asked: &str| (asked == name).then(|| value.to_string())
    };
    let refused = |env: &dyn Fn(&str) -> Option<String>| {
        Otlp::new(endpoint, every, env).unwrap_err().to_string()
    };
    let header = refused(&with("OTEL_EXPORTER_OTLP_HEADERS", "a=b,hush hush"));
    assert!(header.contains("header 2") && !header.contains("hush"), "{header}");
    let attribute = refused(&with("OTEL_RESOURCE_ATTRIBUTES", "cluster"));
    assert!(attribute.contains("`cluster`"), "{attribute}");
    for bad in ["not an address", "127.0.0.1:4317"] {
        assert!(Otlp::new(bad, every, |_| None).unwrap_err().to_string().contains("http://"));
    }
    let other = refused(&with("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"));
    assert!(other.contains("`grpc`"), "{other}");
    assert_eq!(without_user("http://me:pw@host:1/x"), "http://host:1/x");
    assert_eq!((decoded("a%20b%2"), decoded("100%")), ("a b%2".to_string(), "100%".to_string()));
}
