//! Failures as a user sees them: one line, a reason, an exit code.

use janus_proto::{
    error::{ErrorReason, WireError},
    tls::TlsError,
};
use serde_json::{Value, json};

use super::{Outcome, restore::lost_json};
use crate::{
    backup::BackupError,
    browse::{BrowseError, PlaceError, copy::CopyError},
    cache::CacheError,
    config::ConfigError,
    dry_run::DryRunError,
    frozen::SnapshotError,
    link::{LinkError, Remedy, reason_name},
    restore::{Lost, RestoreError, TargetError},
    scan::ScanError,
    seal::SealError,
    snapshot::{ReadError, SelectError},
    source::SourceError,
    state::StateError,
    survey::SurveyError,
    to_folder::FolderError,
    transfer::TransferError,
};

const FAILED: u8 = 1;
const USAGE: u8 = 2;
const NO_SERVER: u8 = 3;
const SOURCE: u8 = 4;
const NOT_FOUND: u8 = 5;
pub(super) const BUSY: u8 = 6;
pub(super) const INTERRUPTED: u8 = 130;

/// A command that failed.
#[derive(Debug)]
pub struct Failure {
    /// One line that names the thing and the way out.
    pub message: String,
    /// Reason that a server gave.
    pub reason: Option<ErrorReason>,
    /// Parts of a snapshot that are lost.
    pub lost: Option<Lost>,
    /// What is known all the same.
    pub known: Option<Box<Outcome>>,
    /// Exit code of the program.
    pub exit_code: u8,
}

impl Failure {
    fn new(exit_code: u8, error: impl std::fmt::Display) -> Self {
        let message = error.to_string().replace('\n', " ");
        Self { message, reason: None, lost: None, known: None, exit_code }
    }

    /// Wrong arguments or settings.
    pub fn usage(error: impl std::fmt::Display) -> Self {
        Self::new(USAGE, error)
    }

    /// Anything else.
    pub fn failed(error: impl std::fmt::Display) -> Self {
        Self::new(FAILED, error)
    }

    /// Asked to stop before anything was begun.
    pub fn interrupted() -> Self {
        Self::new(INTERRUPTED, "interrupted; nothing was done")
    }

    /// As `--json` prints it.
    pub fn json(&self) -> Value {
        let reason = self.reason.map(reason_name);
        let mut json = json!({ "ok": false, "error": self.message, "reason": reason, "exit_code": self.exit_code });
        if let Some(lost) = &self.lost {
            json["lost"] = lost_json(lost);
        }
        if let Some(known) = &self.known {
            json["local"] = known.json.clone();
        }
        json
    }
}

impl From<LinkError> for Failure {
    fn from(error: LinkError) -> Self {
        Self { reason: error.reason(), ..Self::new(code_of(&error), error) }
    }
}

fn code_of(error: &LinkError) -> u8 {
    use ErrorReason as R;
    match (error, error.reason()) {
        (LinkError::Unreachable(_), _) => NO_SERVER,
        (_, Some(R::NoServerReady | R::ServerUnreachable | R::Draining | R::WrongServer)) => {
            NO_SERVER
        }
        (_, Some(R::SnapshotUnknown | R::MachineUnknown)) => NOT_FOUND,
        (_, Some(R::LeaseHeld)) => BUSY,
        // The connection broke, and no other URL took its place.
        (_, None) if error.remedy() == Remedy::Reconnect => NO_SERVER,
        _ => FAILED,
    }
}

impl From<TransferError> for Failure {
    fn from(error: TransferError) -> Self {
        match error {
            TransferError::Link(error) => error.into(),
            TransferError::Scan(error) => error.into(),
            TransferError::Cache(error) => error.into(),
            TransferError::Interrupted => Self::new(INTERRUPTED, error),
            TransferError::Lost { ref source, .. } => {
                Self { reason: source.reason(), ..Self::new(NO_SERVER, &error) }
            }
            TransferError::Differs { ref source, .. } => {
                Self { reason: source.reason(), ..Self::new(FAILED, &error) }
            }
            TransferError::Features { .. } => Self::new(FAILED, error),
        }
    }
}

impl From<ScanError> for Failure {
    fn from(error: ScanError) -> Self {
        match error {
            ScanError::Source(error) => error.into(),
            ScanError::Link(error) => (*error).into(),
            error => Self::new(FAILED, error),
        }
    }
}

impl From<DryRunError> for Failure {
    fn from(error: DryRunError) -> Self {
        match error {
            DryRunError::Scan(error) => error.into(),
            DryRunError::Interrupted => Self::new(INTERRUPTED, error),
        }
    }
}

impl From<FolderError> for Failure {
    fn from(error: FolderError) -> Self {
        match error {
            FolderError::Scan(error) => error.into(),
            FolderError::Interrupted => Self::new(INTERRUPTED, error),
            FolderError::Carried(error) => Self::new(FAILED, error),
        }
    }
}

impl From<SurveyError> for Failure {
    fn from(error: SurveyError) -> Self {
        Self::usage(error.to_string())
    }
}

impl From<BackupError> for Failure {
    fn from(error: BackupError) -> Self {
        match error {
            BackupError::Transfer(error) => error.into(),
            BackupError::State(error) => error.into(),
        }
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Self {
        match error {
            RestoreError::Link(error) => error.into(),
            RestoreError::Interrupted => Self::new(INTERRUPTED, error),
            RestoreError::Select(error) => error.into(),
            RestoreError::Seal(error) => error.into(),
            RestoreError::Lost { ref lost, .. } => Self {
                reason: Some(ErrorReason::StoreDamaged),
                lost: Some(lost.clone()),
                ..Self::new(FAILED, &error)
            },
            RestoreError::Incomplete { ref missing, .. } => {
                Self { lost: Some(missing.clone()), ..Self::new(FAILED, &error) }
            }
            RestoreError::Missing { ref source, ref missing, .. } => Self {
                reason: source.reason(),
                lost: Some(missing.clone()),
                ..Self::new(code_of(source), &error)
            },
            RestoreError::Elsewhere { ref missing, .. } => {
                let lost = Some(missing.clone()).filter(|missing| !missing.is_empty());
                Self { lost, ..Self::new(NO_SERVER, &error) }
            }
            RestoreError::Target(TargetError::Busy { .. } | TargetError::InUse(_)) => {
                Self::new(BUSY, error)
            }
            error => Self::new(FAILED, error),
        }
    }
}

impl From<SelectError> for Failure {
    fn from(error: SelectError) -> Self {
        let exit_code = match error {
            SelectError::Link(error) => return error.into(),
            SelectError::Unknown { .. } => NOT_FOUND,
            SelectError::Away { .. } => NO_SERVER,
            SelectError::Future { .. } => FAILED,
            _ => USAGE,
        };
        Self::new(exit_code, error)
    }
}

impl From<PlaceError> for Failure {
    fn from(error: PlaceError) -> Self {
        match error {
            PlaceError::Browse(error) => error.into(),
            PlaceError::Volume { .. } => Self::new(NOT_FOUND, error),
            PlaceError::Written { .. } => Self::usage(error),
            PlaceError::Layout(_) => Self::new(FAILED, error),
        }
    }
}

impl From<BrowseError> for Failure {
    fn from(error: BrowseError) -> Self {
        Self::new(
            if matches!(error, BrowseError::Unknown { .. }) { NOT_FOUND } else { FAILED },
            error,
        )
    }
}

impl From<CopyError> for Failure {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Browse(error) => error.into(),
            CopyError::Interrupted => Self::new(INTERRUPTED, error),
            CopyError::Folder { .. } => Self::usage(error),
            error => Self::new(FAILED, error),
        }
    }
}

impl From<SealError> for Failure {
    fn from(error: SealError) -> Self {
        let is_setting = matches!(error, SealError::NoKey(_) | SealError::Loose { .. });
        Self::new(if is_setting { USAGE } else { FAILED }, error)
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Link(error) => error.into(),
            error => Self::new(FAILED, error),
        }
    }
}

impl From<CacheError> for Failure {
    fn from(error: CacheError) -> Self {
        match error {
            CacheError::Busy { .. } => Self::new(BUSY, error),
            CacheError::Io { ref source, .. } => {
                Self::new(FAILED, format!("{error}: {source}; check cache_path"))
            }
            error => Self::new(FAILED, error),
        }
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        Self::new(if matches!(error, StateError::Busy { .. }) { BUSY } else { FAILED }, error)
    }
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        let is_setting = matches!(
            error,
            SourceError::Nameless { .. } | SourceError::Twice { .. } | SourceError::Uri { .. }
        );
        Self::new(if is_setting { USAGE } else { SOURCE }, error)
    }
}

impl From<SnapshotError> for Failure {
    fn from(error: SnapshotError) -> Self {
        let is_stopped = matches!(error, SnapshotError::Interrupted);
        Self::new(if is_stopped { INTERRUPTED } else { SOURCE }, error)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::new(USAGE, error)
    }
}

impl From<TlsError> for Failure {
    fn from(error: TlsError) -> Self {
        Self::new(USAGE, error)
    }
}

impl From<WireError> for Failure {
    fn from(error: WireError) -> Self {
        Self::new(USAGE, error)
    }
}
