//! The real programs behind tokens and certificates: who comes in, who does not, and with which
//! exit code.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use lacuna_types::exit;

/// What a collector of metrics is shown.
const OTLP_SECRET: &str = "otlp-secret-3141";

/// How long anything here may take.
const DEADLINE: Duration = Duration::from_secs(30);

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacuna"));
    command.args(args).env_remove("LACUNA_TOKEN_FILE").env_remove("LACUNA_TLS_DIR");
    command.env("OTEL_EXPORTER_OTLP_HEADERS", format!("authorization=Bearer {OTLP_SECRET}"));
    command
}

fn lacuna(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// Runs the command; checks its exit code, and returns what it said.
fn expect(code: u8, args: &[&str]) -> String {
    let output = lacuna(args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let said = text.clone() + &String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(i32::from(code)), "lacuna {args:?}: {said}");
    said
}

/// A coordinator, killed when the test ends.
struct Coordinator {
    child: Child,
    url: String,
    log: PathBuf,
}

impl Coordinator {
    fn start(folder: &Path, args: &[&str]) -> Self {
        let log = folder.join("coordinator.log");
        let state = folder.join("state");
        let mut child = command(&["coordinator", "--listen", "127.0.0.1:0", "--state"])
            .arg(&state)
            .args(args)
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").unwrap_or_else(|| {
            panic!("the coordinator did not start: {}", std::fs::read_to_string(&log).unwrap())
        });
        Coordinator { child, url: url.to_string(), log }
    }

    /// Asks for a page, and returns the whole answer.
    fn get(&self, path: &str, headers: &str) -> String {
        self.request("GET", path, headers)
    }

    fn request(&self, method: &str, path: &str, headers: &str) -> String {
        let addr = self.url.strip_prefix("http://").unwrap();
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\n");
        stream.write_all(format!("{request}{headers}\r\n").as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Makes a token of a role; returns the file that it stands in.
fn token(folder: &Path, role: &str) -> PathBuf {
    let (file, out) = (folder.join("tokens"), folder.join(format!("{role}.token")));
    let args = ["token", "new", "--role", role, "--add-to", text(&file), "--out", text(&out)];
    expect(exit::OK, &args);
    out
}

#[test]
fn an_open_address_needs_a_lock() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let args = ["coordinator", "--listen", "0.0.0.0:0", "--state", text(&state)];
    let said = expect(exit::USAGE, &args);
    assert!(said.contains("refusing to listen on 0.0.0.0:0: without tokens or TLS"), "{said}");
    assert!(said.contains("--token-file") && said.contains("lacuna token new"), "{said}");
    // A certificate of the server's alone keeps nobody out.
    let tls = folder.path().join("tls");
    expect(exit::OK, &["tls", "init", text(&tls)]);
    std::fs::remove_file(tls.join("server/ca.pem")).unwrap();
    let server = tls.join("server");
    let said = expect(exit::USAGE, &[&args[..], &["--tls-dir", text(&server)]].concat());
    assert!(said.contains("refusing to listen"), "{said}");
    for (file, content, expected) in [
        ("empty", "", "has no token"),
        ("bad", "view:12\n", "line 1: expected `role:sha256 of the token in hex`"),
        ("role", "boss:12\n", "`boss` is not a role: expected view, submit, worker or admin"),
    ] {
        let path = folder.path().join(file);
        std::fs::write(&path, content).unwrap();
        let said = expect(exit::USAGE, &[&args[..], &["--token-file", text(&path)]].concat());
        assert!(said.contains(expected) && said.contains(file), "{said}");
    }
}

#[test]
fn tokens_let_in_whom_they_name_and_no_further() {
    let folder = tempfile::tempdir().unwrap();
    let [view, submit, worker, admin] =
        ["view", "submit", "worker", "admin"].map(|role| token(folder.path(), role));
    let tokens = folder.path().join("tokens");
    let coordinator = Coordinator::start(folder.path(), &["--token-file", text(&tokens)]);
    let url = &coordinator.url;
    let with = |token: &Path, args: &[&str], code: u8| {
        expect(code, &[args, &["-c", url, "--token-file", text(token)]].concat())
    };
    let said = expect(exit::UNAUTHORISED, &["runs", "-c", url]);
    assert!(said.contains("no token: give one with `--token-file` or LACUNA_TOKEN_FILE"), "{said}");
    let wrong = folder.path().join("wrong");
    std::fs::write(&wrong, "lacuna_0123").unwrap();
    let said = with(&wrong, &["runs"], exit::UNAUTHORISED);
    assert!(said.contains("the token is not one of this coordinator's"), "{said}");
    with(&view, &["runs"], exit::OK);
    with(&view, &["workers"], exit::OK);
    let said = with(&view, &["checkpoint", "x"], exit::UNAUTHORISED);
    let expected = "this needs the role `submit`, and the caller has the role `view`";
    assert!(said.contains(expected), "{said}");
    let said = with(&submit, &["checkpoint", "x"], exit::FAILED);
    assert!(said.contains("there is no run `x`"), "{said}");
    with(&submit, &["drain", "a:cpu0"], exit::UNAUTHORISED);
    with(&worker, &["runs"], exit::UNAUTHORISED);
    let said = with(&admin, &["drain", "a:cpu0"], exit::FAILED);
    assert!(said.contains("no run has a worker a:cpu0"), "{said}");
}

#[test]
fn a_token_that_is_added_later_counts() {
    let folder = tempfile::tempdir().unwrap();
    token(folder.path(), "view");
    let tokens = folder.path().join("tokens");
    let coordinator = Coordinator::start(folder.path(), &["--token-file", text(&tokens)]);
    let admin = token(folder.path(), "admin");
    let start = Instant::now();
    let args = ["runs", "-c", &coordinator.url];
    while !command(&args).env("LACUNA_TOKEN_FILE", &admin).output().unwrap().status.success() {
        assert!(start.elapsed() < DEADLINE, "a new token is not seen");
        std::thread::yield_now();
    }
}

#[test]
fn pages_ask_for_the_token_as_a_password() {
    let folder = tempfile::tempdir().unwrap();
    let [view, submit, worker] =
        ["view", "submit", "worker"].map(|role| token(folder.path(), role));
    let tokens = folder.path().join("tokens");
    let coordinator = Coordinator::start(folder.path(), &["--token-file", text(&tokens)]);
    let secret = |path: &Path| std::fs::read_to_string(path).unwrap().trim().to_string();
    let basic = |path: &Path| {
        let pair = format!("me:{}", secret(path));
        format!(
            "authorization: Basic {}\r\n",
            base64::engine::general_purpose::STANDARD.encode(pair)
        )
    };
    let status = |path: &str, headers: &str| {
        let answer = coordinator.get(path, headers);
        answer.lines().next().unwrap().split(' ').nth(1).unwrap().parse::<u16>().unwrap()
    };
    assert_eq!([status("/healthz", ""), status("/readyz", "")], [200, 200]);
    for path in ["/", "/metrics", "/runs/x", "/page.css", "/nothing"] {
        let answer = coordinator.get(path, "");
        assert!(answer.starts_with("HTTP/1.1 401"), "{path}: {answer}");
        assert!(answer.to_lowercase().contains("www-authenticate: basic realm="), "{answer}");
        assert_eq!(status(path, &basic(&worker)), 403, "{path}");
    }
    assert_eq!(status("/", &basic(&view)), 200);
    assert_eq!(status("/runs/x", &basic(&view)), 404);
    assert_eq!(status("/nothing", &basic(&view)), 404);
    assert_eq!(status("/metrics", &format!("authorization: Bearer {}\r\n", secret(&view))), 200);
    let page = coordinator.get("/", &basic(&view));
    assert!(page.contains("There is no run yet") && !page.contains("https://"), "{page}");
    assert!(page.to_lowercase().contains("content-security-policy: default-src 'none'"), "{page}");
    // Buttons: for who may, and on pages of this service.
    let press = |headers: &str| {
        let answer = coordinator.request("POST", "/runs/x/do/stop", headers);
        answer.lines().next().unwrap().split(' ').nth(1).unwrap().parse::<u16>().unwrap()
    };
    assert_eq!([press(""), press(&basic(&view)), press(&basic(&submit))], [401, 403, 404]);
    assert_eq!(press(&format!("{}origin: https://evil.example\r\n", basic(&submit))), 403);
}

#[test]
fn certificates_let_in_whom_they_name() {
    let folder = tempfile::tempdir().unwrap();
    let tls = folder.path().join("tls");
    expect(exit::OK, &["tls", "init", text(&tls), "--host", "127.0.0.1"]);
    let dir = |name: &str| text(&tls.join(name)).to_string();
    let coordinator = Coordinator::start(folder.path(), &["--tls-dir", &dir("server")]);
    let url = &coordinator.url;
    assert!(url.starts_with("https://127.0.0.1:"), "{url}");
    let with = |name: &str, args: &[&str], code: u8| {
        expect(code, &[args, &["-c", url, "--tls-dir", &dir(name)]].concat())
    };
    with("view", &["runs"], exit::OK);
    let said = with("view", &["drain", "a:cpu0"], exit::UNAUTHORISED);
    assert!(said.contains("needs the role `admin`, and the caller has the role `view`"), "{said}");
    with("admin", &["drain", "a:cpu0"], exit::FAILED);
    with("worker", &["runs"], exit::UNAUTHORISED);
    let said = expect(exit::USAGE, &["runs", "-c", url]);
    assert!(said.contains("https:// needs the authority's certificate"), "{said}");
    let plain = url.replace("https", "http");
    let said = expect(exit::USAGE, &["runs", "-c", &plain, "--tls-dir", &dir("view")]);
    assert!(said.contains("with TLS files the address begins with https://"), "{said}");
    expect(exit::UNREACHABLE, &["runs", "-c", &plain]);
    // Without a certificate, with another authority's, and with one that has expired.
    std::fs::create_dir(tls.join("none")).unwrap();
    std::fs::copy(tls.join("view/ca.pem"), tls.join("none/ca.pem")).unwrap();
    expired(&tls);
    let other = folder.path().join("other");
    expect(exit::OK, &["tls", "init", text(&other), "--host", "127.0.0.1"]);
    std::fs::create_dir(tls.join("other")).unwrap();
    for (from, name) in [("view/cert.pem", "cert.pem"), ("view/key.pem", "key.pem")] {
        std::fs::copy(other.join(from), tls.join("other").join(name)).unwrap();
    }
    std::fs::copy(tls.join("view/ca.pem"), tls.join("other/ca.pem")).unwrap();
    let said = with("none", &["runs"], exit::UNAUTHORISED);
    assert!(said.contains("no certificate: give one with `--tls-dir`"), "{said}");
    let said = with("expired", &["runs"], exit::UNAUTHORISED);
    assert!(said.contains("expired/cert.pem` is valid from"), "{said}");
    // Nor does the coordinator rely on what clients look at first.
    let shown = |name: &str| bare_call(url, &tls.join(name));
    shown("view").unwrap();
    let refused = shown("expired").unwrap_err();
    assert!(refused.contains("CertificateExpired") || refused.contains("closed"), "{refused}");
    // The other side's word may come, or its closing of the connection.
    let code = lacuna(&["runs", "-c", url, "--tls-dir", &dir("other")]).status.code();
    let codes = [exit::UNAUTHORISED, exit::UNREACHABLE].map(i32::from);
    assert!(code.is_some_and(|code| codes.contains(&code)), "{code:?}");
    // A client knows whom it talks to.
    let args = ["runs", "-c", url, "--tls-dir", &format!("{}/view", text(&other))];
    let said = expect(exit::UNAUTHORISED, &args);
    assert!(said.contains("do not go together"), "{said}");
    // Again with the same folder, the authority stays, and old and new get along.
    expect(exit::OK, &["tls", "init", text(&tls), "--host", "127.0.0.1"]);
    with("submit", &["runs"], exit::OK);
}

/// Asks for the runs, and shows the certificate in a folder whatever it is; returns the refusal
/// with its causes.
fn bare_call(url: &str, dir: &Path) -> Result<(), String> {
    use lacuna_api::v1::ListRunsRequest;
    use lacuna_api::v1::run_service_client::RunServiceClient;
    use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read("ca.pem")))
        .identity(Identity::from_pem(read("cert.pem"), read("key.pem")));
    let endpoint = Endpoint::from_shared(url.to_string()).unwrap().timeout(DEADLINE);
    let endpoint = endpoint.tls_config(tls).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = endpoint.connect().await.map_err(|err| format!("{err:?}"))?;
        let asked = RunServiceClient::new(channel).list_runs(ListRunsRequest::default()).await;
        asked.map(drop).map_err(|refusal| format!("{refusal:?}"))
    })
}

/// Makes a certificate of the role `view` that ran out yesterday.
fn expired(tls: &Path) {
    let read = |name: &str| std::fs::read_to_string(tls.join("ca").join(name)).unwrap();
    let authority = rcgen::KeyPair::from_pem(&read("key.pem")).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&read("cert.pem"), authority).unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    params.distinguished_name.push(rcgen::DnType::OrganizationalUnitName, "view");
    let now = time::OffsetDateTime::now_utc();
    params.not_before = now - time::Duration::days(9);
    params.not_after = now - time::Duration::days(1);
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, &issuer).unwrap();
    let dir = tls.join("expired");
    std::fs::create_dir(&dir).unwrap();
    std::fs::copy(tls.join("view/ca.pem"), dir.join("ca.pem")).unwrap();
    std::fs::write(dir.join("cert.pem"), cert.pem()).unwrap();
    std::fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
}

/// Tokens stand in no log, no command line and no file of the state.
#[test]
fn no_secret_is_left_lying_about() {
    let folder = tempfile::tempdir().unwrap();
    let [view, submit] = ["view", "submit"].map(|role| token(folder.path(), role));
    let tokens = folder.path().join("tokens");
    let mut args = vec!["--token-file", text(&tokens)];
    if cfg!(feature = "otlp") {
        // Nobody collects there: each push fails, and is told.
        args.extend(["--otlp", "http://127.0.0.1:1"]);
    }
    let coordinator = Coordinator::start(folder.path(), &args);
    let url = &coordinator.url;
    let wrong = folder.path().join("wrong");
    std::fs::write(&wrong, "lacuna_a_wrong_one").unwrap();
    for (token, code) in [(&view, exit::OK), (&submit, exit::OK), (&wrong, exit::UNAUTHORISED)] {
        expect(code, &["runs", "-c", url, "--token-file", text(token)]);
    }
    let command_line = std::fs::read(format!("/proc/{}/cmdline", coordinator.child.id())).unwrap();
    let mut seen = vec![("command line".to_string(), command_line)];
    seen.push(("log".to_string(), std::fs::read(&coordinator.log).unwrap()));
    seen.push(("file of tokens".to_string(), std::fs::read(&tokens).unwrap()));
    for entry in std::fs::read_dir(folder.path().join("state")).unwrap() {
        let path = entry.unwrap().path();
        seen.push((path.display().to_string(), std::fs::read(&path).unwrap()));
    }
    assert!(seen.len() > 4, "the state was looked at");
    let given = [&view, &submit, &wrong].map(|token| std::fs::read_to_string(token).unwrap());
    for secret in given.iter().map(|secret| secret.trim()).chain([OTLP_SECRET]) {
        for (what, bytes) in &seen {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{secret} stands in {what}");
        }
    }
    let log = std::fs::read_to_string(&coordinator.log).unwrap();
    assert!(log.contains("refused"), "who was turned away is in the log: {log}");
}
