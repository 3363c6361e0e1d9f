use axum::body::Body;
use axum::http::Request as HttpRequest;

use super::*;

#[test]
fn roles_and_what_they_may() {
    use Role::{Admin, Submit, View, Worker};
    let may = |role: Role| Role::ALL.map(|needed| role.may(needed));
    assert_eq!(may(View), [true, false, false, false]);
    assert_eq!(may(Submit), [true, true, false, false]);
    assert_eq!(may(Worker), [false, false, true, false]);
    assert_eq!(may(Admin), [true; 4]);
    assert_eq!(
        "root".parse::<Role>().unwrap_err().to_string(),
        "`root` is not a role: expected view, submit, worker or admin"
    );
}

/// Every method of the protos is thought of, and what is new needs most until it is.
#[test]
fn every_method_needs_a_role() {
    use prost::Message as _;
    let known = prost_types::FileDescriptorSet::decode(lacuna_api::DESCRIPTORS).unwrap();
    let mut out = String::new();
    for file in known.file.iter().filter(|file| file.package() == "lacuna.v1") {
        for service in &file.service {
            for method in &service.method {
                let role = needed(&format!("/lacuna.v1.{}/{}", service.name(), method.name()));
                out += &format!("{}.{} {}\n", service.name(), method.name(), role.unwrap());
            }
        }
    }
    let expected = "RunService.CreateRun submit
RunService.GetRun view
RunService.ListRuns view
RunService.WatchRun view
RunService.StopRun submit
RunService.RequestCheckpoint submit
RunService.ScaleRun submit
RunService.ForceRun admin
RunService.CancelRun submit
RunService.UpdateRun submit
RunService.ValidateRun view
RunService.DiffRuns view
RunService.GetMetrics view
RunService.StreamLogs view
CheckpointService.ListCheckpoints view
CheckpointService.GetManifest view
CheckpointService.PinCheckpoint submit
CheckpointService.VerifyCheckpoint submit
AdminService.GetInfo view
AdminService.ListWorkers view
AdminService.DrainWorker admin
AdminService.ReleaseWorker admin
AdminService.BanNode admin
AdminService.ListBans view
WorkerService.Session worker
WorkerService.Agent worker
";
    assert_eq!(out, expected);
    assert_eq!(needed("/lacuna.v1.RunService/Anything"), Some(Role::Admin));
    assert_eq!([needed("/healthz"), needed("/grpc.health.v1.Health/Check")], [None; 2]);
    assert_eq!(needed("/runs/x"), Some(Role::View));
}

#[test]
fn files_of_tokens() {
    let token = new_token();
    assert_ne!(token, new_token());
    let line = TokenLine::of(&token, Role::Submit, "ci of team a");
    let text = format!("# who may come in\n\n{line}\n");
    let tokens = Tokens::parse(&text).unwrap();
    let whose = Bearer { role: Role::Submit, name: "ci of team a".to_string() };
    assert_eq!(tokens.bearer_of(&token), Some(&whose));
    assert_eq!(tokens.bearer_of(&token[1..]), None);
    assert_eq!(tokens.bearer_of(""), None);
    assert!(!text.contains(&token));
    for (bad, message) in [
        ("", "has no token"),
        ("# nothing\n", "has no token"),
        ("submit\n", "line 1: expected `role:sha256"),
        ("\nsubmit:0123\n", "line 2: expected `role:sha256"),
        ("boss:0123\n", "line 1"),
    ] {
        let error = Tokens::parse(bad).unwrap_err().to_string();
        assert!(error.starts_with(message), "{bad:?}: {error}");
    }
}

#[test]
fn a_file_of_tokens_that_changes_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens");
    let [old, new] = [new_token(), new_token()];
    let write = |token: &str, role: Role| {
        std::fs::write(&path, TokenLine::of(token, role, "").to_string()).unwrap();
    };
    write(&old, Role::View);
    let file = TokenFile::open(&path).unwrap();
    let roles = || [&old, &new].map(|token| file.bearer_of(token).map(|bearer| bearer.role));
    assert_eq!(roles(), [Some(Role::View), None]);
    let until = |wanted: [Option<Role>; 2]| {
        let start = std::time::Instant::now();
        while roles() != wanted {
            assert!(start.elapsed().as_secs() < 20, "it is not read again");
            std::thread::yield_now();
        }
    };
    write(&new, Role::Admin);
    until([None, Some(Role::Admin)]);
    // A broken line lets nobody in and keeps nobody in; the others count.
    let line = TokenLine::of(&old, Role::Submit, "");
    std::fs::write(&path, format!("nonsense\n{line}\n")).unwrap();
    until([Some(Role::Submit), None]);
    // The last token can be taken back.
    std::fs::write(&path, "").unwrap();
    until([None, None]);
    write(&new, Role::Admin);
    until([None, Some(Role::Admin)]);
    std::fs::remove_file(&path).unwrap();
    until([None, None]);
}

#[test]
fn tokens_come_as_bearer_or_as_password() {
    let of = |value: &str| {
        let request = HttpRequest::builder().header("authorization", value).body(Body::empty());
        token_of(request.unwrap().headers(), false)
    };
    assert_eq!(of("Bearer lacuna_1").as_deref(), Some("lacuna_1"));
    // `any:lacuna_1`
    assert_eq!(of("Basic YW55OmxhY3VuYV8x").as_deref(), Some("lacuna_1"));
    for bad in ["lacuna_1", "Digest x", "Basic !", "Basic YW55"] {
        assert_eq!(of(bad), None, "{bad}");
    }
    // A browser sends its password by itself, also for a page of another site.
    let request = HttpRequest::builder().header("authorization", "Basic YW55OmxhY3VuYV8x");
    assert_eq!(token_of(request.body(Body::empty()).unwrap().headers(), true), None);
}

#[test]
fn requests_keep_their_id_or_get_one() {
    let of = |value: &str| {
        let request = HttpRequest::builder().header("x-request-id", value).body(Body::empty());
        request_id(request.unwrap().headers())
    };
    assert_eq!(of("ci-17"), "ci-17");
    for bad in ["", "two words", &"x".repeat(REQUEST_ID_MAX + 1)] {
        let id = of(bad);
        assert_eq!(id.len(), 16, "{bad:?}: {id:?}");
        assert_ne!(id, of(bad));
    }
}

/// Without a lock, only this machine's own pages and programs come in.
#[test]
fn pages_of_other_sites_do_not_come_in() {
    let door = Door { tokens: None, tls: None, certificates: false };
    let ask = |path: &str, headers: &[(&str, &str)]| {
        let request = HttpRequest::builder().uri(path);
        let request = headers.iter().fold(request, |r, (name, value)| r.header(*name, *value));
        door.admit(&request.body(Body::empty()).unwrap()).err()
    };
    for host in ["localhost:7070", "127.0.0.1:7070", "[::1]:7070", "127.0.0.1"] {
        assert_eq!(ask("/", &[("host", host)]), None, "{host}");
    }
    let elsewhere = Some(Refusal::Elsewhere);
    assert_eq!(ask("/", &[("host", "evil.example:7070")]), elsewhere);
    let host = ("host", "localhost");
    assert_eq!(ask("/", &[host, ("sec-fetch-site", "cross-site")]), elsewhere);
    let link = [host, ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate")];
    assert_eq!(ask("/", &link), None);
    assert_eq!(ask("/", &[host, ("sec-fetch-site", "same-origin")]), None);
    let path = "/lacuna.v1.RunService/CreateRun";
    assert_eq!(ask(path, &[host]), Some(Refusal::NotGrpc));
    assert_eq!(ask(path, &[host, ("content-type", "application/grpc")]), Some(Refusal::NotGrpc));
    let request = HttpRequest::builder().uri(format!("http://localhost{path}")).method("POST");
    let request = request.version(Version::HTTP_2).header("content-type", "application/grpc");
    assert_eq!(door.admit(&request.body(Body::empty()).unwrap()).err(), None);
}

/// A browser sends a password along whoever made the form.
#[test]
fn buttons_count_where_a_page_of_this_service_has_them() {
    let door = Door { tokens: None, tls: None, certificates: false };
    let ask = |headers: &[(&str, &str)]| {
        let request = HttpRequest::builder().uri("/runs/a/do/stop").method("POST");
        let request = request.header("host", "127.0.0.1:7070");
        let request = headers.iter().fold(request, |r, (name, value)| r.header(*name, *value));
        door.admit(&request.body(Body::empty()).unwrap()).err()
    };
    let here = ("origin", "http://127.0.0.1:7070");
    let [same, cross] = ["same-origin", "cross-site"].map(|site| ("sec-fetch-site", site));
    let form = ("sec-fetch-mode", "navigate");
    for headers in [&[][..], &[here], &[here, same, form], &[same, form]] {
        assert_eq!(ask(headers), None, "{headers:?}");
    }
    let elsewhere = ("origin", "https://evil.example");
    let port = ("origin", "http://127.0.0.1:8080");
    let nobody = ("origin", "null");
    for headers in [
        &[elsewhere][..],
        &[port],
        &[nobody],
        &[elsewhere, cross, form],
        &[here, cross, form],
        &[cross, form],
        &[("sec-fetch-site", "same-site"), form],
    ] {
        assert_eq!(ask(headers), Some(Refusal::Elsewhere), "{headers:?}");
    }
    assert_eq!(needed("/runs/a/do/stop"), Some(Role::Submit));
}
