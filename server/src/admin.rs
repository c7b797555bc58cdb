//! Administration of a store: one list of commands and one handler, whoever holds the store.
//!
//! A running server holds its store's lock, so `janus-server usage` and the like reach it through the socket
//! `<image_path>/.admin.sock` ([`socket`]); while none runs they open the store themselves ([`ask`]) and call the same
//! handler. A request is one [`Command`] as a line of JSON, the answer lines of progress and one last line (`wire`):
//! both ends are one program of one version on one host, so there is nothing that a .proto would describe to others, and
//! clap's enum of commands is the wire form too.
//!
//! To add a command: a variant of [`Command`], an arm in [`Admin::run`], a file in `admin/` that makes its [`Answer`].
//! Handlers block; what takes long looks at [`Task::is_cancelled`] and tells its progress.

mod alarm;
mod archive;
pub mod ask;
mod audit;
mod carry;
mod delegated;
mod enroll;
mod lock;
mod missing;
mod moment;
pub mod offline;
mod person;
mod policy;
mod prove;
mod purges;
pub mod queue;
mod rebuild;
mod retention;
pub mod revoke;
mod seed;
pub mod socket;
mod table;
#[cfg(test)]
mod tests;
mod trash;
mod usage;
mod verify;
mod wire;

use std::sync::Arc;

use clap::Subcommand;
use janus_proto::{
    archive::ArchiveError,
    error::WireError,
    ids::{BackupId, DiskId, MachineKey, ServerId, SnapshotId},
    tls::{Identity, TlsError},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use self::person::Person;
use self::queue::Queue;
use crate::{
    audit::{Action, AuditError, Event, Who},
    carry::CarryError,
    chain::store::{SmallFile, StoreError},
    config::Settings,
    enroll::{EnrollError, tokens::Tokens},
    pki::PkiError,
    policy::Policy,
    prove::ProveError,
    retention::{Retention, RetentionError},
    revoked::{RevokeError, Revoked},
    runs::{Machine, Runs},
    serve::{self, ServeError},
};

/// What an administrator asks for: subcommands of `janus-server`, and what travels through the socket.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Show what machines, disks and snapshots take
    Usage(usage::Arguments),
    /// Show what the rules of retention would drop, or drop it
    #[command(subcommand)]
    Retention(retention::Action),
    /// Keep the run of a snapshot whatever the rules say
    Pin {
        /// One of its snapshots
        snapshot: SnapshotId,
    },
    /// Leave the run of a snapshot to the rules again
    Unpin {
        /// One of its snapshots
        snapshot: SnapshotId,
    },
    /// Lock a run until a date: nobody can drop it before, whatever rules and clocks say
    Lock(lock::Arguments),
    /// Show backups that changed a disk as an attack does, or say that this is looked after
    #[command(subcommand)]
    Alarm(alarm::Action),
    /// Move the run of a snapshot, with all its disks, or all runs of a machine to the trash
    Delete {
        /// What
        #[arg(value_name = "SNAPSHOT|USER/MACHINE")]
        target: trash::Target,
    },
    /// Show, bring back or purge what was dropped
    #[command(subcommand)]
    Trash(trash::TrashAction),
    /// Read stored images now and compare them with their hashes
    Verify(verify::Arguments),
    /// Prove that a backup can be restored: read it as a restore does, with its file systems
    Prove(prove::Arguments),
    /// Copy a run with all its disks to a folder, to be carried to another server
    Export(carry::ExportArguments),
    /// Take in the newest backups of another server's machines, so that the next ones here are deltas
    Seed(seed::Arguments),
    /// Copy backups to an object store or folder, show what is there, or read it again
    Archive(archive::Arguments),
    /// Make, show and cancel tokens for which machines get their certificates
    #[command(subcommand)]
    Enroll(enroll::Action),
    /// Refuse certificates: `janus-server pki revoke`
    #[command(skip)]
    Revoke(revoke::Action),
    /// Take in a run that was carried here in a folder, an archived one, or a disk image of another program
    Import(carry::ImportArguments),
    /// Show who did what, and whether the log of it is as it was written
    #[command(subcommand)]
    Audit(audit::Action),
}

impl Command {
    /// How it is recorded; `None` for what only shows something.
    fn event(&self) -> Option<Event> {
        let only_shows = match self {
            Self::Usage(_) | Self::Verify(_) | Self::Prove(_) | Self::Audit(_) => true,
            Self::Retention(action) => action.only_shows(),
            Self::Trash(action) => matches!(action, trash::TrashAction::List),
            Self::Alarm(action) => matches!(action, alarm::Action::List),
            Self::Lock(arguments) => arguments.only_shows(),
            _ => false,
        };
        let text = || serde_json::to_string(self).unwrap_or_default();
        (!only_shows).then(|| Event::new(Action::Command).noting(text()))
    }

    /// True for what takes backups away, or what protects them: it is not done unrecorded.
    fn must_be_recorded(&self) -> bool {
        matches!(
            self,
            Self::Retention(_)
                | Self::Alarm(_)
                | Self::Delete { .. }
                | Self::Unpin { .. }
                | Self::Trash(_)
        )
    }
}

/// What a command prints when it went well.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// For people.
    pub text: String,
    /// For `--json`: an object.
    pub json: Value,
    /// The command was done, and what it found is bad: exit code 1.
    pub is_bad: bool,
}

impl Answer {
    /// An answer that is good news; `json` serializes as an object.
    pub fn new(text: impl Into<String>, json: impl Serialize) -> Self {
        // What can't be shown as JSON would be a bug that every test of the command finds.
        let json = serde_json::to_value(json).unwrap_or(Value::Null);
        Self { text: text.into(), json, is_bad: false }
    }
}

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// No such machine here.
    #[error("no machine {machine} here: `janus-server usage` lists them")]
    UnknownMachine {
        /// As given.
        machine: MachineKey,
    },
    /// The machine has no snapshot of such a disk here.
    #[error("no disk {disk} of machine {machine} here: `janus-server usage` lists them")]
    UnknownDisk {
        /// As given.
        machine: MachineKey,
        /// As given.
        disk: DiskId,
    },
    /// No such snapshot here.
    #[error("no snapshot {snapshot} here: `janus-server usage --snapshots` lists them")]
    UnknownSnapshot {
        /// As given.
        snapshot: SnapshotId,
    },
    /// It was not dropped, or is gone for good.
    #[error("snapshot {snapshot} is not in the trash: `janus-server trash list` shows what is")]
    NotInTrash {
        /// As given.
        snapshot: SnapshotId,
    },
    /// No such archive.
    #[error(
        "no archive {name} in the settings: {known}; a section [archive.{name}] makes one (a server that runs reads its settings when it starts)"
    )]
    UnknownArchive {
        /// As given.
        name: String,
        /// Those that are known.
        known: String,
    },
    /// Another one is at work.
    #[error(
        "archive {name}, or one at the same place, is being written or verified already: try again when that is done"
    )]
    ArchiveBusy {
        /// Its name.
        name: String,
    },
    /// No such run is there.
    #[error(
        "archive {archive} has no run {run} of {machine} that this server put there: `janus-server archive list {archive} --own` shows them"
    )]
    NotArchived {
        /// Its name.
        archive: String,
        /// Whose.
        machine: MachineKey,
        /// As given.
        run: BackupId,
    },
    /// No seeding of that number.
    #[error("no seeding {number} is in the queue: `janus-server seed status` shows them")]
    NotQueued {
        /// As given.
        number: u32,
    },
    /// More would be no use.
    #[error("the queue has {most} seedings already: `janus-server seed cancel` takes one out")]
    QueueFull {
        /// How many.
        most: usize,
    },
    /// Machines can't enrol at this server.
    #[error(
        "machines can't enrol here: section [enroll] of the settings names no `listen` (a server that runs reads its settings when it starts)"
    )]
    NoEnrollment,
    /// Its own certificate is none that who enrols could know.
    #[error(
        "machines can't enrol here: this server's certificate isn't of an authority in `ca`; give it one of `janus-server pki issue server`"
    )]
    NoAuthority,
    /// It would cut off itself.
    #[error("that is this server's own certificate: revoke it at another server")]
    OwnCertificate,
    /// No such token.
    #[error("no open token {id}: `janus-server enroll list` shows them")]
    UnknownToken {
        /// As given.
        id: Uuid,
    },
    /// A name that can't be one.
    #[error(transparent)]
    Name(#[from] WireError),
    /// The certificate authority.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// Revocation.
    #[error(transparent)]
    Revoke(#[from] RevokeError),
    /// Enrolment.
    #[error(transparent)]
    Enroll(#[from] EnrollError),
    /// What isn't recorded isn't done.
    #[error("not done, since it can't be recorded: {0}")]
    Unrecorded(AuditError),
    /// A lock that would be none, or for ever.
    #[error(
        "{until} is not a date to lock until: it must be in the future, and at most 3660 days away, since no command takes a lock off"
    )]
    LockDate {
        /// As given.
        until: String,
    },
    /// No such run.
    #[error(
        "machine {machine} has no run {run} here: `janus-server retention plan {machine}` lists them"
    )]
    UnknownRun {
        /// The machine.
        machine: MachineKey,
        /// As given.
        run: String,
    },
    /// An account without that right.
    #[error("{account} may not do this: {what}")]
    NotDelegated {
        /// Who asks.
        account: String,
        /// Why not.
        what: String,
    },
    /// A purge that needs another person.
    #[error("{0}")]
    Purge(String),
    /// A date that is none.
    #[error("{text:?} is no date such as 2026-12-31 or 2026-12-31T18:00:00Z (UTC)")]
    Date {
        /// As given.
        text: String,
    },
    /// The log can't be used.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The caller has gone, or the server stops.
    #[error("stopped before it was done: what is missing can be done by the same command")]
    Cancelled,
    /// The file system refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Retention.
    #[error(transparent)]
    Retention(#[from] RetentionError),
    /// What is carried by hand.
    #[error(transparent)]
    Carry(CarryError),
    /// A proof.
    #[error(transparent)]
    Prove(ProveError),
    /// Certificate, key or CA.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The certificate is none of a server.
    #[error(transparent)]
    Role(#[from] ServeError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<CarryError> for AdminError {
    fn from(error: CarryError) -> Self {
        match error {
            CarryError::Stopped | CarryError::Archive(ArchiveError::Stopped) => Self::Cancelled,
            error => Self::Carry(error),
        }
    }
}

impl From<ProveError> for AdminError {
    fn from(error: ProveError) -> Self {
        match error {
            ProveError::Stopped => Self::Cancelled,
            error => Self::Prove(error),
        }
    }
}

/// A command at work: who asked may have gone, and wants to know how far it is.
pub struct Task<'a> {
    cancel: &'a CancellationToken,
    progress: &'a dyn Fn(String),
    person: Option<Person>,
}

impl<'a> Task<'a> {
    /// A task that ends early when `cancel` says so; lines for people go to `progress`.
    pub fn new(cancel: &'a CancellationToken, progress: &'a dyn Fn(String)) -> Self {
        Self { cancel, progress, person: None }
    }

    /// The same, asked for by somebody.
    #[must_use]
    pub fn by(self, person: Person) -> Self {
        Self { person: Some(person), ..self }
    }

    /// Who asks for it.
    ///
    /// # Errors
    /// When it is the server itself, which is no person.
    fn person(&self) -> Result<&Person, AdminError> {
        let nobody =
            || AdminError::Purge("a purge that needs two persons is asked for by one".into());
        self.person.as_ref().ok_or_else(nobody)
    }

    /// Who is recorded for it.
    fn who(&self) -> Who {
        self.person.as_ref().map_or_else(Who::server, Person::who)
    }

    /// Tells the caller how far it is. Lines may be left out when they come faster than they are read.
    pub fn tell(&self, line: impl Into<String>) {
        (self.progress)(line.into());
    }

    /// True when nobody waits for the result any more.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// For work that can be stopped from elsewhere.
    pub fn token(&self) -> &CancellationToken {
        self.cancel
    }

    /// Ends a loop.
    ///
    /// # Errors
    /// `Cancelled`.
    pub fn check(&self) -> Result<(), AdminError> {
        if self.is_cancelled() { Err(AdminError::Cancelled) } else { Ok(()) }
    }
}

/// The handler of all commands.
pub struct Admin {
    runs: Arc<Runs>,
    settings: Settings,
    retention: Arc<Retention>,
    queue: Queue,
    tokens: Arc<Tokens>,
    /// Of the server that runs; a command without one reads them itself.
    revoked: Option<Arc<Revoked>>,
    /// What groups may do; only the server that runs knows.
    policy: Option<Arc<Policy>>,
    purges: SmallFile<purges::Requests>,
}

impl Admin {
    /// A handler over an opened store.
    pub fn new(runs: Arc<Runs>, settings: Settings) -> Self {
        let retention = Arc::new(Retention::new(runs.clone(), settings.clone()));
        let queue = Queue::new(runs.store());
        let tokens = Arc::new(Tokens::new(runs.store()));
        let purges = SmallFile::new(runs.store(), purges::FILE);
        Self { runs, settings, retention, queue, purges, tokens, revoked: None, policy: None }
    }

    /// The same for the server that runs, with what it has revoked.
    pub fn with_revoked(self, revoked: Arc<Revoked>) -> Self {
        Self { revoked: Some(revoked), ..self }
    }

    /// The same with the rights of groups.
    pub fn with_policy(self, policy: Arc<Policy>) -> Self {
        Self { policy: Some(policy), ..self }
    }

    /// What is revoked here.
    fn revoked(&self) -> Result<Arc<Revoked>, AdminError> {
        if let Some(revoked) = &self.revoked {
            return Ok(revoked.clone());
        }
        Ok(Arc::new(Revoked::open(self.runs.store(), self.identity()?)?))
    }

    /// Its runs.
    pub fn runs(&self) -> &Arc<Runs> {
        &self.runs
    }

    /// The settings of its server.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The retention of its store.
    pub fn retention(&self) -> &Arc<Retention> {
        &self.retention
    }

    /// This server's name.
    fn server(&self) -> Result<ServerId, AdminError> {
        Ok(serve::name(&self.identity()?)?)
    }

    /// This server's certificate, read anew.
    fn identity(&self) -> Result<Identity, AdminError> {
        let Settings { cert, key, ca, pki, .. } = &self.settings;
        Ok(Identity::load_with(cert, key, ca, pki)?)
    }

    /// The enrolment tokens of its store.
    pub fn tokens(&self) -> &Arc<Tokens> {
        &self.tokens
    }

    /// The seedings that wait.
    fn queue(&self) -> &Queue {
        &self.queue
    }

    /// One machine, or all.
    fn machines(&self, only: Option<&MachineKey>) -> Result<Vec<Arc<Machine>>, AdminError> {
        let Some(key) = only else { return Ok(self.runs.machines()) };
        self.runs.check_machine(key)?;
        let machine = self.runs.machine(key);
        Ok(vec![machine.ok_or_else(|| AdminError::UnknownMachine { machine: key.clone() })?])
    }

    /// Does what a command says. Blocks.
    ///
    /// # Errors
    /// As [`AdminError`] says.
    pub fn run(&self, command: Command, task: &Task<'_>) -> Result<Answer, AdminError> {
        let gives_nothing_back = matches!(
            command,
            Command::Usage(_)
                | Command::Verify(_)
                | Command::Enroll(_)
                | Command::Revoke(_)
                | Command::Prove(_)
                | Command::Export(_)
                | Command::Audit(_)
        );
        if !gives_nothing_back {
            self.runs.store().give_spare();
        }
        let Some(event) = command.event() else { return self.carry_out(command, task) };
        let who = task.who();
        let recorded = self.runs.audit().map(|audit| audit.record(&who, event.clone().asked()));
        let done = match recorded.transpose() {
            Err(error) if command.must_be_recorded() => Err(AdminError::Unrecorded(error)),
            _ => self.carry_out(command, task),
        };
        self.runs.note(&who, event.with_result(&done));
        done
    }

    fn carry_out(&self, command: Command, task: &Task<'_>) -> Result<Answer, AdminError> {
        match command {
            Command::Usage(arguments) => usage::run(self, &arguments, task),
            Command::Retention(action) => retention::run(self, &action, task),
            Command::Pin { snapshot } => trash::pin(self, snapshot),
            Command::Unpin { snapshot } => trash::unpin(self, snapshot),
            Command::Delete { target } => trash::delete(self, &target),
            Command::Trash(action) => trash::trash(self, &action, task),
            Command::Verify(arguments) => verify::run(self, &arguments, task),
            Command::Prove(arguments) => prove::run(self, &arguments, task),
            Command::Export(arguments) => carry::export(self, &arguments, task),
            Command::Import(arguments) => carry::import(self, &arguments, task),
            Command::Seed(arguments) => seed::run(self, &arguments, task),
            Command::Archive(arguments) => archive::run(self, &arguments, task),
            Command::Enroll(action) => enroll::run(self, &action),
            Command::Revoke(action) => revoke::run(self, &action, task),
            Command::Audit(action) => audit::run(self, &action),
            Command::Lock(arguments) => lock::run(self, &arguments, &task.who()),
            Command::Alarm(action) => alarm::run(self, &action),
        }
    }
}
