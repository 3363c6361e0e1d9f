//! The same against a server of another maker: moto, where LACUNA_PEERS_PYTHON has it.

use std::io::{BufRead, BufReader};
use std::num::NonZeroUsize;
use std::process::{Child, Command, Stdio};

use lacuna_types::{CoordEpoch, Generation, Step};

use super::*;
use crate::catalog::{self, verify_and_mark};
use crate::commit::claim;
use crate::doctor;
use crate::layout::RunDir;
use crate::load::{Expected, load_newest};
use crate::retain::{collect_garbage, retain};
use crate::testing::{NOW, attempt, tiny};

/// Starts the server, makes a bucket, says the port, and ends with its stdin; at the end it says
/// how many uploads are under way.
const SERVER: &str = "
import sys, boto3
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
server.start()
port = server.get_host_and_port()[1]
client = boto3.client('s3', endpoint_url=f'http://127.0.0.1:{port}', region_name='us-east-1',
                      aws_access_key_id='key', aws_secret_access_key='secret')
client.create_bucket(Bucket='bucket')
print(port, flush=True)
sys.stdin.read()
print(len(client.list_multipart_uploads(Bucket='bucket').get('Uploads', [])), flush=True)
server.stop()
";

/// A part of 5 MiB is the least that S3 takes.
const PART: u64 = 5 << 20;

struct Peer {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Peer {
    /// Starts it where it is installed.
    fn start() -> Result<(Self, String), String> {
        let python = std::env::var("LACUNA_PEERS_PYTHON")
            .map_err(|_| "LACUNA_PEERS_PYTHON is not set".to_string())?;
        let child = Command::new(&python)
            .args(["-c", SERVER])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.map_err(|error| format!("`{python}` cannot be run: {error}"))?;
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut peer = Peer { child, out };
        let port = peer.line();
        if port.is_empty() {
            return Err(format!("`{python}` cannot serve by moto and boto3"));
        }
        Ok((peer, format!("http://127.0.0.1:{port}")))
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim().to_string()
    }

    /// Returns the number of uploads under way, and ends.
    fn n_uploads(mut self) -> String {
        drop(self.child.stdin.take());
        self.line()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn another_makers_server_does_the_same() {
    let (peer, url) = match Peer::start() {
        Ok(started) => started,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let options = [
        ("aws_endpoint", url.as_str()),
        ("aws_access_key_id", "key"),
        ("aws_secret_access_key", "secret"),
        ("aws_region", "us-east-1"),
        ("allow_http", "true"),
    ];
    let objects = Objects::open_with("s3://bucket/ckpts", &options, Limits::default()).unwrap();
    let objects = objects.hurried(PART, Duration::from_secs(20));
    assert_eq!(doctor::examine(&objects, &objects.root(), 3 * PART as usize).problem(), None);
    let dir = RunDir::on(Arc::new(objects.clone()), objects.root(), "r-7f3a".parse().unwrap());
    claim(&dir, CoordEpoch(7)).unwrap();
    assert!(claim(&dir, CoordEpoch(7)).is_err());
    for step in [1, 2, 3] {
        let state = tiny(step);
        state.save(&dir, 3);
        let found = load_newest(&dir, &Expected::tensors(&state.layout)).unwrap().unwrap();
        state.assert_loaded(&found.state);
    }
    tiny(4).write(&dir, attempt(1), 2);
    let first = catalog::find(&dir, Step(1)).unwrap().unwrap();
    let verified = verify_and_mark(&dir, first.good().unwrap()).unwrap();
    assert_eq!(verified.problems, [""; 0]);
    assert_eq!(retain(&dir, NonZeroUsize::MIN, &[], NOW).unwrap().delete, [Step(2)]);
    assert_eq!(collect_garbage(&dir, Generation(13), &[]).unwrap().len(), 1);
    let names = dir.storage().names(&dir.checkpoints()).unwrap();
    assert_eq!(names, ["step-000000001", "step-000000003"]);
    in_parts(&dir);
    assert_eq!(peer.n_uploads(), "0");
}

/// An object in parts is there whole, or the name stays another's.
fn in_parts(dir: &RunDir) {
    let content: Vec<u8> = (0..11u32 << 20).map(|i| (i.wrapping_mul(40_503) >> 7) as u8).collect();
    let path = dir.path().join("large");
    let begun = || {
        let mut sink = dir.storage().begin(&path, content.len() as u64).unwrap();
        sink.fill(&content).unwrap();
        sink
    };
    let (first, second) = (begun(), begun());
    drop(begun());
    assert_eq!(first.publish().unwrap(), Published::Created);
    assert_eq!(second.publish().unwrap(), Published::Exists);
    assert_eq!(begun().publish().unwrap(), Published::Exists);
    let mut found = vec![0; content.len()];
    dir.storage().open(&path).unwrap().read_exact_at(&mut found, 0).unwrap();
    assert!(found == content);
}
