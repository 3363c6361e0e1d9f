//! The one mapping between errors and gRPC statuses.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// When to try again, where that helps.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Domain of every reason.
pub const DOMAIN: &str = "lacuna.dev";

/// Machine-readable reason of a refusal; also the `reason` of `google.rpc.ErrorInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The run spec is wrong.
    InvalidSpec,
    /// There is no such run.
    RunNotFound,
    /// A run of this name exists with another spec.
    RunExists,
    /// There is no such worker.
    WorkerNotFound,
    /// A live worker of this name exists on another agent.
    WorkerExists,
    /// Build, protocol or arithmetic differ.
    VersionSkew,
    /// A message is malformed.
    Malformed,
    /// The caller has not shown who it is.
    Unauthenticated,
    /// The caller may not do this.
    RoleMissing,
    /// What the caller wants to change was changed by somebody else.
    Conflict,
    /// There is no such checkpoint.
    CheckpointNotFound,
    /// The checkpoint cannot be used.
    CheckpointCorrupt,
    /// The machine is kept out.
    NodeBanned,
    /// The service does too much of it already.
    RateLimited,
    /// Data or checkpoints cannot be read or written here.
    Storage,
    /// The run is in no state for it.
    WrongState,
    /// Another coordinator leads.
    NotLeader,
    /// The coordinator is reading its state.
    Starting,
    /// It was not done in time.
    TimedOut,
    /// The service is going down.
    ShuttingDown,
    /// There is no such method here; an older or newer build may have it.
    UnknownMethod,
    /// A message is larger than any may be.
    TooLarge,
    /// A bug.
    Internal,
}

impl Reason {
    const ALL: [Reason; 23] = [
        Reason::InvalidSpec,
        Reason::RunNotFound,
        Reason::RunExists,
        Reason::WorkerNotFound,
        Reason::WorkerExists,
        Reason::VersionSkew,
        Reason::Malformed,
        Reason::Unauthenticated,
        Reason::RoleMissing,
        Reason::Conflict,
        Reason::CheckpointNotFound,
        Reason::CheckpointCorrupt,
        Reason::NodeBanned,
        Reason::RateLimited,
        Reason::Storage,
        Reason::WrongState,
        Reason::NotLeader,
        Reason::Starting,
        Reason::TimedOut,
        Reason::ShuttingDown,
        Reason::UnknownMethod,
        Reason::TooLarge,
        Reason::Internal,
    ];

    /// Returns the word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            Reason::InvalidSpec => "INVALID_SPEC",
            Reason::RunNotFound => "RUN_NOT_FOUND",
            Reason::RunExists => "RUN_EXISTS",
            Reason::WorkerNotFound => "WORKER_NOT_FOUND",
            Reason::WorkerExists => "WORKER_EXISTS",
            Reason::VersionSkew => "VERSION_SKEW",
            Reason::Malformed => "MALFORMED",
            Reason::Unauthenticated => "UNAUTHENTICATED",
            Reason::RoleMissing => "ROLE_MISSING",
            Reason::Conflict => "CONFLICT",
            Reason::CheckpointNotFound => "CHECKPOINT_NOT_FOUND",
            Reason::CheckpointCorrupt => "CHECKPOINT_CORRUPT",
            Reason::NodeBanned => "NODE_BANNED",
            Reason::RateLimited => "RATE_LIMITED",
            Reason::Storage => "STORAGE",
            Reason::WrongState => "WRONG_STATE",
            Reason::NotLeader => "NOT_LEADER",
            Reason::Starting => "STARTING",
            Reason::TimedOut => "TIMED_OUT",
            Reason::ShuttingDown => "SHUTTING_DOWN",
            Reason::UnknownMethod => "UNKNOWN_METHOD",
            Reason::TooLarge => "MESSAGE_TOO_LARGE",
            Reason::Internal => "INTERNAL",
        }
    }

    fn code(self) -> Code {
        match self {
            Reason::InvalidSpec | Reason::Malformed => Code::InvalidArgument,
            Reason::RunNotFound | Reason::WorkerNotFound | Reason::CheckpointNotFound => {
                Code::NotFound
            }
            Reason::Conflict => Code::Aborted,
            Reason::CheckpointCorrupt => Code::DataLoss,
            Reason::RateLimited | Reason::TooLarge => Code::ResourceExhausted,
            Reason::UnknownMethod => Code::Unimplemented,
            Reason::RunExists | Reason::WorkerExists => Code::AlreadyExists,
            Reason::VersionSkew | Reason::Storage | Reason::NodeBanned | Reason::WrongState => {
                Code::FailedPrecondition
            }
            Reason::TimedOut => Code::DeadlineExceeded,
            Reason::Unauthenticated => Code::Unauthenticated,
            Reason::RoleMissing => Code::PermissionDenied,
            Reason::ShuttingDown | Reason::NotLeader | Reason::Starting => Code::Unavailable,
            Reason::Internal => Code::Internal,
        }
    }

    /// Tells whether the same call may succeed later.
    pub fn retry_helps(self) -> bool {
        use Reason::{NodeBanned, NotLeader, RateLimited, ShuttingDown, Starting, TimedOut};
        self == Reason::WorkerExists
            || matches!(
                self,
                ShuttingDown | NotLeader | Starting | TimedOut | NodeBanned | RateLimited
            )
    }
}

/// Makes the status of a refusal.
pub fn status(reason: Reason, message: impl Into<String>) -> Status {
    let no_metadata: [(String, String); 0] = [];
    let mut details = ErrorDetails::with_error_info(reason.word(), DOMAIN, no_metadata);
    if reason.retry_helps() {
        details.set_retry_info(Some(RETRY_AFTER));
    }
    Status::with_error_details(reason.code(), message, details)
}

/// Makes the refusal of a coordinator that does not lead, with the leader's address, empty where
/// nobody leads.
pub fn not_leader(leader: &str) -> Status {
    let reason = Reason::NotLeader;
    let metadata = [("leader".to_string(), leader.to_string())];
    let mut details = ErrorDetails::with_error_info(reason.word(), DOMAIN, metadata);
    details.set_retry_info(Some(RETRY_AFTER));
    let text = match leader {
        "" => "this coordinator does not lead, and nobody does yet".to_string(),
        leader => format!("this coordinator does not lead; {leader} does"),
    };
    Status::with_error_details(reason.code(), text, details)
}

/// Makes the refusal of a specification: `violations` are keys and what is wrong with each.
pub fn invalid_spec(message: String, violations: Vec<(String, String)>) -> Status {
    let no_metadata: [(String, String); 0] = [];
    let reason = Reason::InvalidSpec;
    let mut details = ErrorDetails::with_error_info(reason.word(), DOMAIN, no_metadata);
    for (key, description) in violations {
        details.add_bad_request_violation(key, description);
    }
    Status::with_error_details(reason.code(), message, details)
}

/// Gives a refusal a reason that a library made, before any service saw the call: messages that
/// are none or too large, and methods that nobody has. `None` where there is nothing to add.
///
/// Codes stay those of <https://grpc.github.io/grpc/core/md_doc_statuscodes.html>, but for messages
/// that are too large: `RESOURCE_EXHAUSTED` as other servers say, where tonic says `OUT_OF_RANGE`.
pub fn explained(refusal: &Status) -> Option<Status> {
    if !refusal.details().is_empty() {
        return None;
    }
    let (reason, code) = match refusal.code() {
        Code::Unimplemented => (Reason::UnknownMethod, Code::Unimplemented),
        Code::OutOfRange => (Reason::TooLarge, Code::ResourceExhausted),
        code @ (Code::Internal | Code::InvalidArgument) => (Reason::Malformed, code),
        _ => return None,
    };
    let text = match refusal.message() {
        "" => "there is no such method here",
        text => text,
    };
    let no_metadata: [(String, String); 0] = [];
    let details = ErrorDetails::with_error_info(reason.word(), DOMAIN, no_metadata);
    Some(Status::with_error_details(code, text, details))
}

/// Reads the reason of a status that [`status`] made, possibly by an older or newer build.
pub fn reason(status: &Status) -> Option<Reason> {
    let info = status.get_details_error_info()?;
    Reason::ALL.into_iter().find(|reason| reason.word() == info.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_wire() {
        for known in Reason::ALL {
            let status = status(known, "run `x`: no");
            assert_eq!(reason(&status), Some(known));
            assert_eq!(status.message(), "run `x`: no");
        }
        assert_eq!(reason(&Status::internal("plain")), None);
    }

    #[test]
    fn what_libraries_refuse_gets_a_reason() {
        for (bare, want, code) in [
            (Status::unimplemented(""), Reason::UnknownMethod, Code::Unimplemented),
            (Status::out_of_range("5 MB"), Reason::TooLarge, Code::ResourceExhausted),
            (Status::internal("no field"), Reason::Malformed, Code::Internal),
        ] {
            let full = explained(&bare).unwrap();
            assert_eq!((reason(&full), full.code()), (Some(want), code));
            assert!(!full.message().is_empty());
            assert!(explained(&full).is_none());
        }
        assert!(explained(&Status::not_found("x")).is_none());
        assert!(explained(&status(Reason::Internal, "x")).is_none());
    }
}
