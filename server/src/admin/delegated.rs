//! What accounts may ask for that are neither root nor the server's own: commands about machines that a group of theirs administers,
//! by the server's policy. What can't be taken back, and what is about the whole store, stays with root.

use janus_proto::{
    ids::{MachineKey, SnapshotId},
    tls::Role,
};

use super::{
    Admin, AdminError, Command, Person, alarm, enroll,
    trash::{Target, TrashAction, in_trash},
};
use crate::policy::Right;

/// That a person may have this done.
pub(super) fn check(admin: &Admin, command: &Command, person: &Person) -> Result<(), AdminError> {
    let account = person.account();
    let refused = |what: String| AdminError::NotDelegated { account: account.clone(), what };
    let Some(machine) = about(admin, command)? else {
        return Err(refused("this command is for root alone".into()));
    };
    let policy = admin.policy.as_ref();
    let grants = policy.map(|policy| policy.of(&Role::User(account.clone())));
    match grants.is_some_and(|grants| grants.allow(Right::Admin, &machine)) {
        true => Ok(()),
        false => Err(refused(format!("no group of it administers {machine}"))),
    }
}

/// The one machine that a command is about, of those that may be delegated.
fn about(admin: &Admin, command: &Command) -> Result<Option<MachineKey>, AdminError> {
    let of_snapshot = |snapshot: SnapshotId| {
        let held = admin.runs().snapshot(snapshot);
        held.map(|held| held.run.machine.clone()).ok_or(AdminError::UnknownSnapshot { snapshot })
    };
    Ok(Some(match command {
        Command::Pin { snapshot } | Command::Unpin { snapshot } => of_snapshot(*snapshot)?,
        Command::Delete { target: Target::Snapshot(snapshot) } => of_snapshot(*snapshot)?,
        Command::Delete { target: Target::Machine(machine) } => machine.clone(),
        Command::Trash(TrashAction::Restore { snapshot }) => in_trash(admin, *snapshot)?.0,
        Command::Alarm(alarm::Action::Clear { machine }) => machine.clone(),
        Command::Enroll(enroll::Action::Token { machine, user, .. }) => {
            MachineKey::new(user, machine)?
        }
        Command::Lock(arguments) => match arguments.machine() {
            Some(machine) => machine.clone(),
            None => return Ok(None),
        },
        Command::Verify(arguments) => match arguments.machine() {
            Some(machine) => machine.clone(),
            None => return Ok(None),
        },
        Command::Usage(_)
        | Command::Retention(_)
        | Command::Trash(_)
        | Command::Alarm(_)
        | Command::Enroll(_)
        | Command::Prove(_)
        | Command::Export(_)
        | Command::Seed(_)
        | Command::Archive(_)
        | Command::Revoke(_)
        | Command::Import(_)
        | Command::Audit(_) => return Ok(None),
    }))
}
