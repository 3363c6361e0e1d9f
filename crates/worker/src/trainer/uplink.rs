//! A trainer's stream to the coordinator: opened, introduced, and opened again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lacuna_api::client::{ClientError, connect};
use lacuna_api::error::{Reason, reason};
use lacuna_api::v1::worker_service_client::WorkerServiceClient;
use lacuna_api::{MESSAGE_BYTES_MAX, v1, wire};
use lacuna_checkpoint::chain;
use lacuna_control::message::ToWorker;
use lacuna_types::{BuildId, Generation, Incarnation, RunId, Step, WorkerId, exit};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use crate::args::CredentialArgs;

/// Bound of every queue of a session: a few messages a second pass.
pub const QUEUE: usize = 64;
/// First and longest pause between attempts to reach the coordinator.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Longest time to open a connection.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// What the connection tells the session.
pub enum Net {
    /// A stream is open, and takes messages here.
    Open {
        /// Where messages go.
        requests: mpsc::Sender<v1::SessionRequest>,
    },
    /// The coordinator says what to work for.
    Welcome(Box<v1::Welcome>),
    /// The coordinator said something else.
    Message(ToWorker),
    /// The stream is gone, or could not be opened.
    Down {
        /// Why, for people.
        why: String,
        /// Exit code, where another attempt is of no use.
        fatal: Option<u8>,
    },
}

/// What the next hello says; the connection reads it whenever it (re)connects.
#[derive(Clone, Debug, Default)]
pub struct HelloFacts {
    /// The run that this worker works for.
    pub run: Option<RunId>,
    /// Step of the state in memory.
    pub state: Option<Step>,
    /// The generation that it takes part in, 0 for none.
    pub generation: Generation,
    /// Whether it is connected to that generation's members, or connecting.
    pub up: bool,
}

/// Keeps a stream to the coordinator open, and opens it again whenever it breaks.
pub struct Uplink {
    /// Address of the coordinator.
    pub url: String,
    /// How to prove who this is; read anew for each connection, since files may be replaced.
    pub credentials: CredentialArgs,
    /// Whether a connection was let in before: then a refusal may be of a file being replaced.
    pub was_let_in: AtomicBool,
    /// Who.
    pub worker: WorkerId,
    /// Which life of it.
    pub incarnation: Incarnation,
    /// Where peers reach its collective.
    pub endpoint: String,
    /// What it computes on, for people.
    pub device: String,
    /// What the next hello says.
    pub facts: watch::Receiver<HelloFacts>,
    /// Where news goes.
    pub events: mpsc::Sender<Net>,
}

impl Uplink {
    /// Runs until nobody takes its news.
    pub async fn run(self) {
        let mut pause = RETRY.0;
        loop {
            let (why, fatal, was_up) = self.once().await;
            if self.events.send(Net::Down { why, fatal }).await.is_err() {
                return;
            }
            pause = if was_up { RETRY.0 } else { (pause * 2).min(RETRY.1) };
            tokio::time::sleep(pause).await;
        }
    }

    /// One connection, from opening to its end: why it ended, whether for good, whether it was up.
    async fn once(&self) -> (String, Option<u8>, bool) {
        let credentials = match self.credentials.read() {
            Ok(credentials) => credentials,
            Err(err) => return (chain(&err), None, false),
        };
        let before = self.was_let_in.load(Ordering::Relaxed);
        let channel = match connect(&self.url, CONNECT_DEADLINE, &credentials).await {
            Ok(channel) => channel,
            Err(err) => return (chain(&err), hopeless(&err, before), false),
        };
        let mut client =
            WorkerServiceClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
        let (requests, outgoing) = mpsc::channel(QUEUE);
        // The queue is new and has room.
        let _ = requests.try_send(self.hello());
        let mut answers = match client.session(ReceiverStream::new(outgoing)).await {
            Ok(response) => response.into_inner(),
            Err(status) => return refused(&status, before),
        };
        self.was_let_in.store(true, Ordering::Relaxed);
        if self.events.send(Net::Open { requests }).await.is_err() {
            return ("the session is gone".into(), None, false);
        }
        let mut was_up = false;
        loop {
            let response = match answers.message().await {
                Ok(Some(response)) => response,
                Ok(None) => return ("the coordinator closed the stream".into(), None, was_up),
                Err(status) if was_up => return (status.to_string(), None, was_up),
                Err(status) => return refused(&status, before),
            };
            let event = match response.message {
                Some(v1::session_response::Message::Welcome(welcome)) => {
                    Net::Welcome(Box::new(welcome))
                }
                _ => match wire::from_coordinator(response) {
                    Ok(message) => Net::Message(message),
                    Err(err) => return (err.to_string(), None, was_up),
                },
            };
            was_up = true;
            if self.events.send(event).await.is_err() {
                return ("the session is gone".into(), None, was_up);
            }
        }
    }

    fn hello(&self) -> v1::SessionRequest {
        let facts = self.facts.borrow().clone();
        let hello = v1::Hello {
            worker_id: self.worker.to_string(),
            incarnation: self.incarnation.0,
            endpoint: self.endpoint.clone(),
            build: Some(BuildId::this().into()),
            device: self.device.clone(),
            run_id: facts.run.map(|run| run.to_string()).unwrap_or_default(),
            state_step: facts.state.map(|step| step.0),
            generation: facts.generation.0,
            up: facts.up,
        };
        v1::SessionRequest { message: Some(v1::session_request::Message::Hello(hello)) }
    }
}

/// Returns the exit code of an error that trying again cannot mend: a certificate may be renewed
/// where it was good before.
pub(crate) fn hopeless(error: &ClientError, was_let_in: bool) -> Option<u8> {
    match error {
        ClientError::Address { .. } | ClientError::Scheme { .. } | ClientError::Tls { .. } => {
            Some(exit::USAGE)
        }
        ClientError::Certificate { .. } if !was_let_in => Some(exit::UNAUTHORISED),
        _ => None,
    }
}

/// Decides whether a refusal is final; one for want of a right is, but for those that had it.
pub(crate) fn refused(status: &tonic::Status, was_let_in: bool) -> (String, Option<u8>, bool) {
    let text = format!("refused by the coordinator: {}", status.message());
    match reason(status) {
        Some(Reason::VersionSkew) => (text, Some(exit::VERSION), false),
        Some(Reason::Malformed) => (text, Some(exit::USAGE), false),
        // Another machine may serve: a scheduler moves the job.
        Some(Reason::NodeBanned) => (text, Some(exit::UNFIT), false),
        Some(Reason::Unauthenticated | Reason::RoleMissing) if !was_let_in => {
            (text, Some(exit::UNAUTHORISED), false)
        }
        _ => (text, None, false),
    }
}
