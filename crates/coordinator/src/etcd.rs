//! What a coordinator needs of etcd: keys, transactions that a leader's key guards, and leases.
//!
//! A client of its own, since the usual one asks for `protoc` wherever it is built; see
//! docs/adr/0028. Every call has a deadline and tries each endpoint once, beginning with the one
//! that answered last.

mod message;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use prost::Message;
use tokio::runtime::{Handle, Runtime};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use self::message as m;

/// How long an endpoint may take to answer.
const CALL_DEADLINE: Duration = Duration::from_secs(3);
/// How long it may take to renew a lease, which another endpoint can do as well.
const KEEP_DEADLINE: Duration = Duration::from_millis(500);
/// Pause before a write is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// Largest answer that is read: a page of keys.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// Most keys of a page, and the bytes that it is meant to have: of large values it has fewer.
const PAGE: i64 = 500;
const PAGE_BYTES: usize = 4 << 20;
/// Operations of a transaction: a server takes 128 unless it is told otherwise.
pub(crate) const OPS_MAX: usize = 100;
/// Bytes of a transaction: a server takes 1.5 MiB unless it is told otherwise.
pub(crate) const BYTES_MAX: usize = 1 << 20;

/// Something that etcd did not do.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// An endpoint that is none.
    #[error("`{endpoint}` is not an endpoint of etcd, such as http://127.0.0.1:2379")]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        #[source]
        source: tonic::transport::Error,
    },
    /// No endpoint did it.
    #[error("etcd did not {what}: {why}")]
    Call {
        /// What was asked.
        what: &'static str,
        /// The last answer.
        why: String,
    },
    /// Another coordinator leads by now.
    #[error("this coordinator leads no longer: its key in etcd is gone")]
    NotLeader,
}

/// A change of one key.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Change {
    /// The key has this value from now on.
    Put { key: String, value: Vec<u8> },
    /// The keys from the first to before the second are gone.
    Delete { from: String, to: String },
}

impl Change {
    pub fn put(key: String, value: impl Into<Vec<u8>>) -> Self {
        Change::Put { key, value: value.into() }
    }
}

/// A key and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub key: String,
    pub value: Vec<u8>,
    /// Orders keys by when they were made.
    pub created: i64,
}

/// The right to lead, as etcd knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Leadership {
    pub key: String,
    /// The revision that made the key.
    pub revision: i64,
    pub lease: i64,
    /// From when on the lease counts, at the latest.
    pub since: Instant,
    /// How long it lasts after each renewal.
    pub ttl: Duration,
}

/// What came of a candidacy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Election {
    Won(Leadership),
    /// Somebody else leads, whose value this is.
    Lost(String),
}

/// A thread that serves connections to etcd, whatever holds other threads up.
#[derive(Debug)]
pub(crate) struct OwnThread(Option<Runtime>);

impl OwnThread {
    /// Starts it under a name.
    pub fn start(name: &str) -> Result<Self, EtcdError> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let made = builder.worker_threads(1).thread_name(name).enable_all().build();
        let failed =
            |err: std::io::Error| EtcdError::Call { what: "get a thread", why: err.to_string() };
        Ok(OwnThread(Some(made.map_err(failed)?)))
    }

    /// Returns where its tasks are spawned.
    pub fn handle(&self) -> &Handle {
        self.0.as_ref().expect("there until dropped").handle()
    }
}

impl Drop for OwnThread {
    fn drop(&mut self) {
        // Not waited for: this may be a thread that serves others.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A connection to an ensemble of etcd.
#[derive(Clone, Debug)]
pub(crate) struct Etcd {
    endpoints: Arc<[String]>,
    tls: Option<ClientTlsConfig>,
    channels: Arc<[Channel]>,
    first: Arc<AtomicUsize>,
}

impl Etcd {
    /// Prepares connections, which are made when they are needed.
    pub fn new(endpoints: &[String], tls: Option<&ClientTlsConfig>) -> Result<Self, EtcdError> {
        let open = |endpoint: &String| {
            let bad = |source| EtcdError::Endpoint { endpoint: endpoint.clone(), source };
            let mut made = Endpoint::from_shared(endpoint.clone())
                .map_err(bad)?
                .connect_timeout(CALL_DEADLINE)
                .http2_keep_alive_interval(Duration::from_secs(5))
                .keep_alive_timeout(CALL_DEADLINE);
            if let Some(tls) = tls.filter(|_| endpoint.starts_with("https://")) {
                made = made.tls_config(tls.clone()).map_err(bad)?;
            }
            Ok(made.connect_lazy())
        };
        let channels = endpoints.iter().map(open).collect::<Result<Vec<Channel>, EtcdError>>()?;
        Ok(Etcd {
            endpoints: endpoints.into(),
            tls: tls.cloned(),
            channels: channels.into(),
            first: Arc::default(),
        })
    }

    /// Prepares connections to the same servers that another thread serves.
    pub fn on(&self, thread: &OwnThread) -> Result<Self, EtcdError> {
        let _there = thread.handle().enter();
        Etcd::new(&self.endpoints, self.tls.as_ref())
    }

    /// Returns a key's value.
    pub async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, EtcdError> {
        let range = m::RangeRequest { key: key.into(), ..Default::default() };
        let found: m::RangeResponse = self.call("read a key", RANGE, range).await?;
        Ok(found.kvs.into_iter().next().map(|kv| kv.value))
    }

    /// Returns all keys that begin with `prefix`, as they were at one moment, by key.
    pub async fn all(&self, prefix: &str) -> Result<Vec<Pair>, EtcdError> {
        let (mut out, mut revision) = (Vec::new(), 0);
        let (mut key, mut limit) = (prefix.as_bytes().to_vec(), PAGE);
        loop {
            let range_end = behind(prefix);
            let range = m::RangeRequest { key: key.clone(), range_end, limit, revision };
            let page: m::RangeResponse = match self.call("read the state", RANGE, range).await {
                Ok(page) => page,
                // Small values were followed by large ones, or the way to a server is slow.
                Err(EtcdError::Call { .. }) if limit > 1 => {
                    limit = (limit / 4).max(1);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let bytes: usize = page.kvs.iter().map(|kv| kv.key.len() + kv.value.len()).sum();
            limit = next_limit(page.kvs.len(), bytes);
            if revision == 0 {
                revision = page.header.map_or(0, |header| header.revision);
            }
            let Some(last) = page.kvs.last() else { return Ok(out) };
            key = last.key.clone();
            key.push(0);
            out.extend(page.kvs.into_iter().map(|kv| Pair {
                key: String::from_utf8_lossy(&kv.key).into_owned(),
                value: kv.value,
                created: kv.create_revision,
            }));
            if !page.more {
                return Ok(out);
            }
        }
    }

    /// Makes changes, all or none, if the leadership still is what it was.
    pub async fn change(&self, as_of: &Leadership, changes: &[Change]) -> Result<(), EtcdError> {
        let op = |change: &Change| m::RequestOp {
            request: Some(match change.clone() {
                Change::Put { key, value } => {
                    m::Op::Put(m::PutRequest { key: key.into(), value, lease: 0 })
                }
                Change::Delete { from, to } => m::Op::DeleteRange(m::DeleteRangeRequest {
                    key: from.into(),
                    range_end: to.into(),
                }),
            }),
        };
        let txn = m::TxnRequest {
            compare: vec![was_created(&as_of.key, as_of.revision)],
            success: changes.iter().map(op).collect(),
            failure: Vec::new(),
        };
        let done: m::TxnResponse = self.call("write", TXN, txn).await?;
        if done.succeeded { Ok(()) } else { Err(EtcdError::NotLeader) }
    }

    /// The same, tried again until a leader has to give up: what was written already is written
    /// again, with the same values.
    pub async fn change_in_time(
        &self,
        as_of: &Leadership,
        changes: &[Change],
    ) -> Result<(), EtcdError> {
        let until = Instant::now() + as_of.ttl * 3 / 4;
        loop {
            match self.change(as_of, changes).await {
                Err(EtcdError::Call { .. }) if Instant::now() + RETRY_AFTER < until => {
                    tokio::time::sleep(RETRY_AFTER).await;
                }
                done => return done,
            }
        }
    }

    /// Takes `key` with `value` for as long as a lease of `ttl` is kept, if nobody has it.
    pub async fn campaign(
        &self,
        key: &str,
        value: &str,
        ttl: Duration,
    ) -> Result<Election, EtcdError> {
        let held = m::RangeRequest { key: key.into(), ..Default::default() };
        let found: m::RangeResponse = self.call("read who leads", RANGE, held.clone()).await?;
        let whose = |kv: &m::KeyValue| String::from_utf8_lossy(&kv.value).into_owned();
        if let Some(kv) = found.kvs.first() {
            return Ok(Election::Lost(whose(kv)));
        }
        let since = Instant::now();
        let grant = m::LeaseGrantRequest { ttl: ttl.as_secs().max(1) as i64 };
        let granted: m::LeaseGrantResponse = self.call("grant a lease", GRANT, grant).await?;
        let lease = granted.id;
        let put = m::PutRequest { key: key.into(), value: value.into(), lease };
        let txn = m::TxnRequest {
            compare: vec![was_created(key, 0)],
            success: vec![m::RequestOp { request: Some(m::Op::Put(put)) }],
            failure: vec![m::RequestOp { request: Some(m::Op::Range(held)) }],
        };
        let done: m::TxnResponse = self.call("elect a leader", TXN, txn).await?;
        if done.succeeded {
            let revision = done.header.map_or(0, |header| header.revision);
            let key = key.to_string();
            return Ok(Election::Won(Leadership { key, revision, lease, since, ttl }));
        }
        // The lease would go by itself.
        let _ = self.revoke(lease).await;
        let range = done.responses.into_iter().find_map(|response| response.range);
        Ok(Election::Lost(range.and_then(|range| range.kvs.first().map(whose)).unwrap_or_default()))
    }

    /// Keeps a lease for another while; returns false where it is gone.
    pub async fn keep(&self, lease: i64) -> Result<bool, EtcdError> {
        let kept = self.try_each("keep a lease", KEEP_DEADLINE, async |channel| {
            let mut grpc = ready(channel).await?;
            // One request on a stream of its own: the next one may go to another endpoint.
            let asked = tokio_stream::iter([m::LeaseKeepAliveRequest { id: lease }]);
            let codec: ProstCodec<m::LeaseKeepAliveRequest, m::LeaseKeepAliveResponse> =
                ProstCodec::default();
            let path = PathAndQuery::from_static(KEEP);
            let answers = grpc.streaming(Request::new(asked), path, codec).await?;
            answers.into_inner().message().await
        });
        Ok(kept.await?.is_some_and(|answer| answer.ttl > 0))
    }

    /// Gives a lease back, with the keys that go with it.
    pub async fn revoke(&self, id: i64) -> Result<(), EtcdError> {
        let revoke = m::LeaseRevokeRequest { id };
        self.call::<_, m::LeaseRevokeResponse>("revoke a lease", REVOKE, revoke).await.map(|_| ())
    }

    async fn call<Q, A>(
        &self,
        what: &'static str,
        path: &'static str,
        asked: Q,
    ) -> Result<A, EtcdError>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        self.try_each(what, CALL_DEADLINE, async |channel| {
            let mut grpc = ready(channel).await?;
            let codec: ProstCodec<Q, A> = ProstCodec::default();
            let path = PathAndQuery::from_static(path);
            Ok(grpc.unary(Request::new(asked.clone()), path, codec).await?.into_inner())
        })
        .await
    }

    /// Asks one endpoint after another, the one that answered last first.
    async fn try_each<T, F>(
        &self,
        what: &'static str,
        deadline: Duration,
        ask: impl Fn(Channel) -> F,
    ) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let first = self.first.load(Ordering::Relaxed);
        let mut why = "no endpoints".to_string();
        for i in 0..self.channels.len() {
            let at = (first + i) % self.channels.len();
            match tokio::time::timeout(deadline, ask(self.channels[at].clone())).await {
                Ok(Ok(answer)) => {
                    self.first.store(at, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok(Err(status)) => why = status.message().to_string(),
                Err(_) => why = format!("no answer within {deadline:?}"),
            }
        }
        Err(EtcdError::Call { what, why })
    }
}

/// Returns how many keys the next page may have, after one of `n` keys and `bytes`.
fn next_limit(n: usize, bytes: usize) -> i64 {
    let mean = bytes.div_ceil(n.max(1)).max(1);
    ((PAGE_BYTES / mean) as i64).clamp(1, PAGE)
}

const RANGE: &str = "/etcdserverpb.KV/Range";
const TXN: &str = "/etcdserverpb.KV/Txn";
const GRANT: &str = "/etcdserverpb.Lease/LeaseGrant";
const REVOKE: &str = "/etcdserverpb.Lease/LeaseRevoke";
const KEEP: &str = "/etcdserverpb.Lease/LeaseKeepAlive";

async fn ready(channel: Channel) -> Result<Grpc<Channel>, Status> {
    let mut grpc = Grpc::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
    grpc.ready().await.map_err(|err| Status::unavailable(lacuna_checkpoint::chain(&err)))?;
    Ok(grpc)
}

/// Compares the revision that made a key, 0 for one that is not there.
fn was_created(key: &str, revision: i64) -> m::Compare {
    m::Compare {
        result: m::CompareResult::Equal.into(),
        target: m::CompareTarget::Create.into(),
        key: key.into(),
        create_revision: Some(revision),
    }
}

/// Returns the first key behind all that begin with `prefix`.
pub(crate) fn behind(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // Prefixes are ASCII.
    *end.last_mut().expect("a prefix") += 1;
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_as_many_keys_as_an_answer_has_room_for() {
        assert_eq!(next_limit(500, 500 * 100), PAGE);
        assert_eq!(next_limit(10, 10 << 20), 4);
        assert_eq!(next_limit(1, 60 << 20), 1);
        assert_eq!(next_limit(0, 0), PAGE);
    }
}
