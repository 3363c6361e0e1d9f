//! Callers that mean harm, or are broken: a coordinator answers each with a code, and lives on.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lacuna_api::client::Client;
use lacuna_api::error::{Reason, reason};
use lacuna_api::v1;
use prost::Message as _;
use tokio_stream::StreamExt as _;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

const DEADLINE: Duration = Duration::from_secs(30);

/// Sends and takes bytes as they are.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(to, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut out = vec![0; bytes::Buf::remaining(from)];
        bytes::Buf::copy_to_slice(from, &mut out);
        Ok(Some(out))
    }
}

struct Coordinator {
    child: Child,
    url: String,
    _folder: tempfile::TempDir,
}

impl Coordinator {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_lacuna"))
            .args(["coordinator", "--listen", "127.0.0.1:0", "--state"])
            .arg(folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.trim().strip_prefix("listening on ").unwrap().to_string();
        Coordinator { child, url, _folder: folder }
    }

    async fn client(&self) -> Client {
        Client::connect(&self.url, DEADLINE).await.unwrap()
    }

    /// Checks that it is the process that was started, and answers.
    async fn is_well(&mut self) {
        assert!(self.child.try_wait().unwrap().is_none(), "it has ended");
        assert_eq!(self.client().await.list_runs().await.unwrap(), []);
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Calls a method of any service with raw bytes, as a stream of one; returns the first answer.
async fn call(channel: &Channel, path: &'static str, bytes: Vec<u8>) -> Result<Vec<u8>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.map_err(|err| Status::unavailable(err.to_string()))?;
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    let request = Request::new(tokio_stream::once(bytes));
    let answer = grpc.streaming(request, path, Raw);
    let mut stream = match tokio::time::timeout(DEADLINE, answer).await {
        Ok(answer) => answer?.into_inner(),
        Err(_) => return Err(Status::deadline_exceeded("no answer")),
    };
    let first = tokio::time::timeout(Duration::from_millis(200), stream.next()).await;
    match first {
        Ok(Some(found)) => found,
        // A session that waits, or has ended.
        Ok(None) | Err(_) => Ok(Vec::new()),
    }
}

/// Numbers that look random and are the same every time.
struct Draw(u64);

impl Draw {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

/// Changes, cuts or lengthens a message.
fn damaged(good: &[u8], draw: &mut Draw) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for _ in 0..1 + draw.below(4) {
        match draw.below(4) {
            0 => bytes.truncate(draw.below(bytes.len() + 1)),
            1 => bytes.extend((0..draw.below(20)).map(|_| draw.below(256) as u8)),
            _ if bytes.is_empty() => bytes.push(draw.below(256) as u8),
            _ => {
                let at = draw.below(bytes.len());
                bytes[at] ^= 1 << draw.below(8);
            }
        }
    }
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_messages_are_refused() {
    let mut coordinator = Coordinator::start();
    let endpoint = tonic::transport::Endpoint::from_shared(coordinator.url.clone()).unwrap();
    let channel = endpoint.connect().await.unwrap();
    let run = v1::GetRunRequest { run_id: "nobody".to_string() }.encode_to_vec();
    let create = v1::CreateRunRequest {
        spec: "{\"schema\":1,\"name\":\"x\"}".to_string(),
        resume: true,
        n_samples: 7,
        fingerprint: "blake3:00".to_string(),
        request_id: "a".to_string(),
    };
    let hello = v1::Hello { worker_id: "a:cpu0".to_string(), ..Default::default() };
    let message = Some(v1::session_request::Message::Hello(hello));
    let session = v1::SessionRequest { message }.encode_to_vec();
    let hello = v1::NodeHello { node: "a".to_string(), ..Default::default() };
    let message = Some(v1::agent_request::Message::Hello(hello));
    let agent = v1::AgentRequest { message }.encode_to_vec();
    let methods: [(&'static str, Vec<u8>); 8] = [
        ("/lacuna.v1.RunService/GetRun", run.clone()),
        ("/lacuna.v1.RunService/CreateRun", create.encode_to_vec()),
        ("/lacuna.v1.RunService/ListRuns", vec![8, 1]),
        ("/lacuna.v1.RunService/StopRun", run.clone()),
        ("/lacuna.v1.AdminService/DrainWorker", run.clone()),
        ("/lacuna.v1.WorkerService/Session", session),
        ("/lacuna.v1.WorkerService/Agent", agent),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", run),
    ];
    let mut draw = Draw(0x1234_5678_9abc_def1);
    let mut refused = 0;
    for i in 0..400 {
        let (path, good) = &methods[i % methods.len()];
        let answer = call(&channel, path, damaged(good, &mut draw)).await;
        if let Err(status) = answer {
            refused += 1;
            let code = status.code();
            let is_known = matches!(
                code,
                Code::InvalidArgument
                    | Code::NotFound
                    | Code::Internal
                    | Code::FailedPrecondition
                    | Code::AlreadyExists
            );
            assert!(is_known, "{path}, message {i}: {code:?} {}", status.message());
            let explained = reason(&status).is_some() || !path.starts_with("/lacuna.");
            assert!(explained, "{path}, message {i}: {code:?} without a reason");
        }
    }
    assert!(refused > 200, "most are no message or name nobody: {refused}");
    coordinator.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_messages_are_refused() {
    let mut coordinator = Coordinator::start();
    let request = v1::CreateRunRequest {
        spec: "x".repeat(lacuna_api::MESSAGE_BYTES_MAX + 1),
        ..Default::default()
    };
    let error = coordinator.client().await.create_run(request).await.unwrap_err();
    let lacuna_api::client::ClientError::Refused(status) = &error else { panic!("{error}") };
    assert_eq!(status.code(), Code::ResourceExhausted, "{error}");
    assert_eq!(reason(status), Some(Reason::TooLarge));
    assert!(error.to_string().contains("message length too large"), "{error}");
    coordinator.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn methods_that_nobody_has_are_refused_with_a_reason() {
    let mut coordinator = Coordinator::start();
    let endpoint = tonic::transport::Endpoint::from_shared(coordinator.url.clone()).unwrap();
    let channel = endpoint.connect().await.unwrap();
    for path in ["/lacuna.v1.RunService/Paint", "/lacuna.v9.PaintService/Paint"] {
        let refusal = call(&channel, path, Vec::new()).await.unwrap_err();
        assert_eq!(refusal.code(), Code::Unimplemented, "{path}");
        assert_eq!(reason(&refusal), Some(Reason::UnknownMethod), "{path}");
    }
    coordinator.is_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_name_is_one_run_and_a_request_counts_once() {
    let coordinator = Coordinator::start();
    let folder = tempfile::tempdir().unwrap();
    let spec = |seed: u32| {
        let text = format!(
            "schema = 1\nname = \"once\"\nbase = \"preset:demo\"\ndata.shards = \"/data\"\n\
             data.order = \"global\"\ntrain.seed = {seed}\ncheckpoint.to = \"{}\"\n",
            folder.path().display()
        );
        lacuna_spec::parse_text("spec", &text, &[]).unwrap().spec.to_json().to_string()
    };
    let wish = |seed, id: &str| v1::CreateRunRequest {
        spec: spec(seed),
        resume: true,
        n_samples: 6000,
        fingerprint: "blake3:00".to_string(),
        request_id: id.to_string(),
    };
    // Eight at once: one of them is the first.
    let mut all = tokio::task::JoinSet::new();
    for n in 0..8 {
        let (mut client, wish) = (coordinator.client().await, wish(0, &format!("wish-{n}")));
        all.spawn(async move { client.create_run(wish).await.unwrap().1 });
    }
    let created = all.join_all().await;
    assert_eq!(created.iter().filter(|created| **created).count(), 1, "{created:?}");

    let mut client = coordinator.client().await;
    let answers = |n: usize| wish(0, &format!("wish-{n}"));
    let mut again = Vec::new();
    for n in 0..8 {
        again.push(client.create_run(answers(n)).await.unwrap().1);
    }
    assert_eq!(again.iter().filter(|created| **created).count(), 1);

    // One that comes late does not undo what was asked for since; a new one does.
    client.cancel_run("once", "enough").await.unwrap();
    let (run, _) = client.create_run(answers(0)).await.unwrap();
    assert_eq!(run.state, "cancelled");
    let (run, _) = client.create_run(wish(0, "wish-new")).await.unwrap();
    assert_ne!(run.state, "cancelled");
    let refused = client.create_run(wish(1, "wish-0")).await.unwrap_err();
    assert!(refused.to_string().contains("another request had"), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn specs_that_are_none_are_refused_with_what_is_wrong() {
    let mut coordinator = Coordinator::start();
    let mut client = coordinator.client().await;
    for (spec, expected) in [
        ("", "EOF"),
        ("[]", "table"),
        ("{\"schema\":1}", "missing key"),
        ("{\"schema\":1,\"name\":\"../../etc\"}", "name"),
        (&"[".repeat(100_000), "recursion"),
    ] {
        let request = v1::CreateRunRequest { spec: spec.to_string(), ..Default::default() };
        let error = client.create_run(request).await.unwrap_err();
        let lacuna_api::client::ClientError::Refused(status) = &error else { panic!("{error}") };
        let shown: String = spec.chars().take(40).collect();
        assert_eq!(status.code(), Code::InvalidArgument, "{shown}: {error}");
        assert!(error.to_string().contains(expected), "{shown}: {error}");
    }
    coordinator.is_well().await;
}
