//! The API as clients meet it that know nothing but its schema: reflection, and runs submitted by
//! programs that read no data.

use std::time::Duration;

use lacuna_api::client::{ClientError, connect};
use lacuna_api::error::{Reason, reason};
use lacuna_api::tls::Credentials;
use lacuna_api::v1;
use lacuna_data::Dataset;
use lacuna_tests::Cluster;

use crate::fixture;

/// Asks a coordinator's reflection for its services, and for the file that has a message.
macro_rules! reflected {
    ($version:ident, $channel:expr) => {{
        use tonic_reflection::pb::$version as pb;
        let mut client = pb::server_reflection_client::ServerReflectionClient::new($channel);
        let ask = |message| pb::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(message),
        };
        let requests = tokio_stream::iter([
            ask(pb::server_reflection_request::MessageRequest::ListServices(String::new())),
            ask(pb::server_reflection_request::MessageRequest::FileContainingSymbol(
                "lacuna.v1.Run".to_string(),
            )),
        ]);
        let mut answers = client.server_reflection_info(requests).await.unwrap().into_inner();
        let (mut services, mut files) = (Vec::new(), 0);
        while let Some(answer) = answers.message().await.unwrap() {
            use pb::server_reflection_response::MessageResponse as Answer;
            match answer.message_response.unwrap() {
                Answer::ListServicesResponse(list) => {
                    services.extend(list.service.into_iter().map(|service| service.name));
                }
                Answer::FileDescriptorResponse(found) => files += found.file_descriptor_proto.len(),
                other => panic!("{other:?}"),
            }
        }
        (services, files)
    }};
}

#[test]
fn reflection_speaks_both_versions() {
    let fixture = fixture();
    let cluster = Cluster::start(&fixture);
    let url = cluster.url.clone();
    cluster.ask(async |_| {
        let channel =
            connect(&url, Duration::from_secs(20), &Credentials::default()).await.unwrap();
        let new = reflected!(v1, channel.clone());
        let old = reflected!(v1alpha, channel);
        for (services, files) in [new, old] {
            for name in ["RunService", "WorkerService", "CheckpointService", "AdminService"] {
                assert!(services.contains(&format!("lacuna.v1.{name}")), "{services:?}");
            }
            assert!(services.contains(&"grpc.health.v1.Health".to_string()), "{services:?}");
            assert!(files >= 1, "the file of a message");
        }
    });
}

#[test]
fn who_did_not_look_at_the_data_leaves_it_to_the_coordinator() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let path = fixture.spec("unseen", 12, &[("data.order", "\"auto\"")]);
    let toml = std::fs::read_to_string(path).unwrap();
    let data = Dataset::open(&fixture.path("data")).unwrap();
    let absolute = vec![
        format!("data.shards={}", fixture.path("data").display()),
        format!("checkpoint.to={}", fixture.path("ckpt").display()),
    ];
    let created = cluster.ask(async |mut client| {
        let run = |spec| v1::CreateRunRequest { spec, resume: true, ..Default::default() };
        let effective = async |client: &mut lacuna_api::client::Client, more: &[String]| {
            let found = client.validate_run(&toml, more).await.unwrap();
            assert_eq!(found.problems, []);
            found.effective
        };
        let refused = |result: Result<_, ClientError>| match result {
            Err(ClientError::Refused(status)) => {
                (reason(&status), tonic_violations(&status), status.message().to_string())
            }
            other => panic!("not refused: {other:?}"),
        };
        // A path of a machine that nobody named, and data that is not there.
        let here = effective(&mut client, &["data.shards=data".to_string()]).await;
        let (why, fields, text) = refused(client.create_run(run(here)).await);
        assert_eq!((why, &fields[..]), (Some(Reason::InvalidSpec), &["data.shards".into()][..]));
        assert!(text.contains("absolute"), "{text}");
        let mut nowhere = absolute.clone();
        nowhere[0] = "data.shards=/nowhere/at/all".to_string();
        let nowhere = effective(&mut client, &nowhere).await;
        let (why, fields, text) = refused(client.create_run(run(nowhere)).await);
        assert_eq!((why, &fields[..]), (Some(Reason::InvalidSpec), &["data.shards".into()][..]));
        assert!(text.contains("/nowhere/at/all"), "{text}");
        let spec = effective(&mut client, &absolute).await;
        let first = client.create_run(run(spec.clone())).await.unwrap();
        let again = client.create_run(run(spec)).await.unwrap();
        assert!(first.1 && !again.1);
        first.0
    });
    assert_eq!(created.n_samples, data.n_samples());
    assert_eq!(created.fingerprint, data.fingerprint().to_string());
    cluster.add("a", 1);
    assert_eq!(cluster.wait_end(&created.run_id).run.state, "finished");
}

/// Returns the fields that a refusal names.
fn tonic_violations(status: &tonic::Status) -> Vec<String> {
    use tonic_types::StatusExt as _;
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.clone());
    violations.unwrap_or_default().into_iter().map(|violation| violation.field).collect()
}
