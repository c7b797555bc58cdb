//! Errors on the wire: the table that gives each reason its gRPC code and retry, and invalid fields.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::ids::BackupId;
pub use crate::pb::ErrorReason;

/// Domain of every `google.rpc.ErrorInfo` of this package.
pub const DOMAIN: &str = "janus.v1";
/// Key of the run that holds the lease, in the metadata of LEASE_HELD's `ErrorInfo`.
const HOLDER: &str = "backup_id";

/// A field from the wire, a file name or a setting that is missing or invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A required field is empty.
    #[error("{field} is missing")]
    Missing {
        /// The field's name.
        field: &'static str,
    },
    /// A field of fixed length has another.
    #[error("{field} has {actual} bytes, not {expected}")]
    Length {
        /// The field's name.
        field: &'static str,
        /// Length it must have.
        expected: usize,
        /// Length it has.
        actual: usize,
    },
    /// Anything else.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field's name.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

impl WireError {
    /// An invalid field.
    pub fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }
}

impl From<WireError> for Status {
    fn from(error: WireError) -> Status {
        status(ErrorReason::InvalidField, error.to_string())
    }
}

/// gRPC code of a reason, as the table in `types.proto` says.
pub fn code(reason: ErrorReason) -> Code {
    use ErrorReason as R;
    match reason {
        R::InvalidField | R::BlockHashMismatch | R::DiskTwice => Code::InvalidArgument,
        R::IdentityMissing => Code::Unauthenticated,
        R::NotAllowed | R::ProofRefused | R::TokenRefused => Code::PermissionDenied,
        R::SnapshotUnknown | R::SessionExpired | R::MachineUnknown | R::HandleExpired => {
            Code::NotFound
        }
        R::LeaseHeld | R::EpochSuperseded | R::HeadMoved => Code::Aborted,
        R::DigestMismatch | R::StoreDamaged => Code::DataLoss,
        R::StoreFull | R::QuotaExceeded | R::TooMany => Code::ResourceExhausted,
        R::NoServerReady | R::ServerUnreachable | R::WrongServer | R::Draining => Code::Unavailable,
        R::VersionUnsupported | R::RunState | R::ServerInUse => Code::FailedPrecondition,
        R::StoreFailed => Code::Internal,
        R::Unspecified => Code::Unknown,
    }
}

/// How long a caller should wait before it repeats the call, where waiting helps.
pub fn retry_after(reason: ErrorReason) -> Option<Duration> {
    use ErrorReason as R;
    match reason {
        R::LeaseHeld => Some(Duration::from_secs(30)),
        R::TooMany | R::ServerUnreachable | R::WrongServer | R::Draining => {
            Some(Duration::from_secs(5))
        }
        R::NoServerReady | R::StoreFailed => Some(Duration::from_secs(10)),
        _ => None,
    }
}

/// A status with `ErrorInfo` and, where it helps, `RetryInfo`.
pub fn status(reason: ErrorReason, message: impl Into<String>) -> Status {
    let mut details = ErrorDetails::with_error_info(reason.as_str_name(), DOMAIN, []);
    if let Some(wait) = retry_after(reason) {
        details.set_retry_info(Some(wait));
    }
    Status::with_error_details(code(reason), message, details)
}

/// LEASE_HELD, with the run that holds the lease in its `ErrorInfo`.
pub fn lease_held(holder: BackupId, message: impl Into<String>) -> Status {
    let reason = ErrorReason::LeaseHeld;
    let about = [(HOLDER.to_owned(), holder.to_string())];
    let mut details = ErrorDetails::with_error_info(reason.as_str_name(), DOMAIN, about);
    details.set_retry_info(retry_after(reason));
    Status::with_error_details(code(reason), message, details)
}

/// The run that holds the lease, of a status LEASE_HELD.
pub fn lease_holder(status: &Status) -> Option<BackupId> {
    status.get_details_error_info()?.metadata.get(HOLDER)?.parse().ok()
}

/// The reason a status carries, if it is one of ours.
pub fn reason(status: &Status) -> Option<ErrorReason> {
    let info = status.get_details_error_info()?;
    if info.domain != DOMAIN {
        return None;
    }
    ErrorReason::from_str_name(&info.reason)
}

/// How long a status asks its caller to wait.
pub fn retry_delay(status: &Status) -> Option<Duration> {
    status.get_details_retry_info()?.retry_delay
}

/// The first 80 characters of text from outside, for a message.
pub fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_wire() {
        for number in 1.. {
            let Ok(reason) = ErrorReason::try_from(number) else { break };
            let status = status(reason, "why");
            assert_eq!(super::reason(&status), Some(reason));
            assert_ne!(status.code(), Code::Unknown, "{reason:?} has no code");
        }
    }
}
