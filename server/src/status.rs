//! Errors of all modules as gRPC statuses: the only place where one becomes the other.

use janus_proto::error::{ErrorReason, lease_held, status};
use tonic::Status;

use crate::{
    chain::{opened::OpenError, store::StoreError},
    mirror::MirrorError,
    restore::RestoreError,
    runs::RunError,
    session::SessionError,
};

impl From<RunError> for Status {
    fn from(error: RunError) -> Self {
        let text = error.to_string();
        match error {
            RunError::Unknown { .. } | RunError::ChainDamaged { .. } => {
                status(ErrorReason::SessionExpired, text)
            }
            RunError::LeaseHeld { holder, .. } => lease_held(holder, text),
            RunError::Superseded { .. } => status(ErrorReason::EpochSuperseded, text),
            RunError::HeadMoved { .. } => status(ErrorReason::HeadMoved, text),
            RunError::State { .. }
            | RunError::OtherDisks { .. }
            | RunError::BuiltOn { .. }
            | RunError::Older { .. }
            | RunError::Locked { .. }
            | RunError::KeptByAlarm { .. }
            | RunError::Purging { .. } => status(ErrorReason::RunState, text),
            RunError::CounterJump { .. }
            | RunError::FormatTooSmall { .. }
            | RunError::TooLarge { .. }
            | RunError::NameTaken { .. } => status(ErrorReason::InvalidField, text),
            RunError::TooMany | RunError::Importing { .. } => status(ErrorReason::TooMany, text),
            RunError::Full(_) => status(ErrorReason::StoreFull, text),
            RunError::Quota { .. } => status(ErrorReason::QuotaExceeded, text),
            RunError::Session(error) => error.into(),
            RunError::Head { source, .. } => {
                tracing::error!(error = %source, "a disk's head can't be opened");
                status(ErrorReason::StoreFailed, text)
            }
            RunError::Store(error) => error.into(),
        }
    }
}

impl From<SessionError> for Status {
    fn from(error: SessionError) -> Self {
        let text = error.to_string();
        match error {
            SessionError::Full { .. } => {
                status(ErrorReason::StoreFull, format!("the store is full: {text}"))
            }
            SessionError::DigestMismatch { .. } => status(ErrorReason::DigestMismatch, text),
            SessionError::Failed => status(ErrorReason::SessionExpired, text),
            SessionError::Io { .. }
            | SessionError::HeadDamaged { .. }
            | SessionError::Image(_)
            | SessionError::Table(_) => {
                tracing::error!(%error, "a session failed");
                status(ErrorReason::StoreFailed, text)
            }
        }
    }
}

impl From<StoreError> for Status {
    fn from(error: StoreError) -> Self {
        // What is faulty was logged when it was found.
        if !matches!(error, StoreError::Faulty { .. }) {
            tracing::error!(%error, "the store failed");
        }
        status(ErrorReason::StoreFailed, error.to_string())
    }
}

impl From<OpenError> for Status {
    fn from(error: OpenError) -> Self {
        tracing::error!(%error, "a snapshot can't be opened");
        let reason = match error.is_damage() {
            true => ErrorReason::StoreDamaged,
            false => ErrorReason::StoreFailed,
        };
        status(reason, error.to_string())
    }
}

impl From<RestoreError> for Status {
    fn from(error: RestoreError) -> Self {
        let text = error.to_string();
        match error {
            RestoreError::UnknownSnapshot { .. } | RestoreError::OnlyTable { .. } => {
                status(ErrorReason::SnapshotUnknown, text)
            }
            RestoreError::Mirror(MirrorError::Unknown { .. }) => {
                status(ErrorReason::SnapshotUnknown, text)
            }
            RestoreError::Mirror(error) => {
                tracing::error!(%error, "a mirrored table can't be read");
                status(ErrorReason::StoreDamaged, text)
            }
            RestoreError::UnknownHandle { .. } => status(ErrorReason::HandleExpired, text),
            RestoreError::TooMany => status(ErrorReason::TooMany, text),
            RestoreError::Open(error) => error.into(),
            RestoreError::Lost { .. } | RestoreError::Table(_) => {
                tracing::error!(error = text, "a snapshot can't be read");
                status(ErrorReason::StoreDamaged, text)
            }
            RestoreError::Run(error) => error.into(),
        }
    }
}
