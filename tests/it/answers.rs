//! What commands answer where they cannot do what was asked, and calls in pages.

use std::collections::BTreeSet;
use std::time::Duration;

use lacuna_api::client::connect;
use lacuna_api::error::{Reason, reason};
use lacuna_api::tls::Credentials;
use lacuna_api::v1;
use lacuna_api::v1::run_service_client::RunServiceClient;
use lacuna_tests::{Cluster, said};
use lacuna_types::exit;

use crate::fixture;

#[test]
fn nobody_is_told_that_something_will_happen_that_will_not() {
    let fixture = fixture();
    let mut cluster = Cluster::start(&fixture);
    let url = cluster.url.clone();
    let lacuna = |args: &[&str]| said(&fixture.run(&[args, &["-c", &url]].concat()));
    let run = cluster.submit(&fixture.spec("answers", 4000, &[]));
    let (code, ..) = lacuna(&["wait", "answers", "--limit", "1s"]);
    assert_eq!(code, i32::from(exit::WAIT_TIMED_OUT), "it has no workers");
    cluster.add("a", 1);
    cluster.wait(&run, "some steps", |seen| seen.step() >= 5);
    let (code, out, _) = lacuna(&["status", "answers"]);
    assert!(code == 0 && out.contains("8 slots over 1 workers, 8 at most: 100 %"), "{out}");
    let (code, out, err) = lacuna(&["stop", "answers"]);
    assert_eq!(code, 0, "{out}{err}");
    let (code, out, err) = lacuna(&["checkpoint", "answers"]);
    assert!(code == 1 && err.contains("run answers is stopped: it saves no"), "{out}{err}");
    assert_eq!(lacuna(&["wait", "answers"]).0, i32::from(exit::WAIT_FAILED), "not finished");
    // The worker is with no run now.
    let (code, out, err) = lacuna(&["drain", "a:cpu0"]);
    assert!(code == 1 && err.contains("waits for a run"), "{out}{err}");

    let short = cluster.submit(&fixture.spec("short", 10, &[]));
    assert_eq!(cluster.wait_end(&short).run.state, "finished");
    let (code, out, err) = lacuna(&["scale", "short", "1:2"]);
    assert!(code == 1 && err.contains("run short is finished"), "{out}{err}");
    let (code, out, err) = lacuna(&["checkpoint", "short"]);
    assert!(code == 1 && err.contains("run short is finished"), "{out}{err}");
    let (code, ..) = lacuna(&["wait", "short", "--timeout", "30s"]);
    assert_eq!(code, i32::from(exit::OK));
    cluster.ask(async |mut client| {
        let lacuna_api::client::ClientError::Refused(status) =
            client.force_run("short").await.unwrap_err()
        else {
            panic!("not refused");
        };
        assert_eq!(reason(&status), Some(Reason::WrongState));
    });
}

#[test]
fn lists_come_in_pages_and_each_run_once() {
    let fixture = fixture();
    let cluster = Cluster::start(&fixture);
    let names = ["a", "b", "c", "d", "e"];
    for name in names {
        cluster.submit(&fixture.spec(name, 10, &[]));
    }
    let url = cluster.url.clone();
    cluster.ask(async |_| {
        let channel = connect(&url, Duration::from_secs(20), &Credentials::default()).await;
        let mut runs = RunServiceClient::new(channel.unwrap());
        let (mut seen, mut page_token, mut sizes) = (BTreeSet::new(), String::new(), Vec::new());
        loop {
            let request = v1::ListRunsRequest { page_size: 2, page_token };
            let page = runs.list_runs(request).await.unwrap().into_inner();
            sizes.push(page.runs.len());
            for run in page.runs {
                assert!(seen.insert(run.run_id.clone()), "{} twice", run.run_id);
            }
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        assert_eq!(sizes, [2, 2, 1]);
        assert!(seen.iter().map(String::as_str).eq(names), "{seen:?}");
    });
}
