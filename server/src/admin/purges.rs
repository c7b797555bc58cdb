//! Purges that a second person must confirm: `<image_path>/.purges.json`.
//!
//! One person asks for the purge of what is in the trash then, another one confirms it; of that, and of nothing that was deleted later,
//! the space comes free. Persons are told apart as [`super::person`] says.

use janus_proto::{
    ids::{BackupId, MachineKey},
    show::date,
};
use serde::{Deserialize, Serialize};

use super::{Admin, AdminError, Person};
use crate::{chain::store::StoreError, runs::now_ms};

pub(super) const FILE: &str = ".purges.json";
/// Requests that wait.
const MOST: usize = 100;

/// A purge that somebody has asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Request {
    /// Names it.
    pub number: u32,
    /// Unix milliseconds.
    pub asked_ms: i64,
    person: u32,
    name: String,
    /// What was in the trash then.
    pub runs: Vec<(MachineKey, BackupId)>,
}

impl Request {
    /// For people.
    pub fn describe(&self) -> String {
        let (number, runs, name) = (self.number, self.runs.len(), &self.name);
        let asked = date(self.asked_ms);
        format!(
            "request {number}: {name} asked at {asked} to purge {runs} runs; another person confirms it by `janus-server trash purge --confirm {number}`"
        )
    }
}

/// Those that wait.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Requests {
    last: u32,
    requests: Vec<Request>,
}

/// Requests of which something is still in the trash.
pub(super) fn all(admin: &Admin) -> Result<Vec<Request>, StoreError> {
    Ok(admin.purges.lock().value()?.requests.clone())
}

/// Notes what is asked for.
pub(super) fn ask(
    admin: &Admin,
    person: &Person,
    runs: Vec<(MachineKey, BackupId)>,
) -> Result<Request, AdminError> {
    let mut file = admin.purges.lock();
    let mut waiting = file.value()?.clone();
    let is_there = |(machine, run): &(MachineKey, BackupId)| {
        admin.runs().trashed(machine).iter().any(|trashed| trashed.run.backup == *run)
    };
    waiting.requests.retain(|request| request.runs.iter().any(is_there));
    if waiting.requests.len() >= MOST {
        return Err(AdminError::Purge(format!(
            "{MOST} requests wait already: `janus-server trash purge --cancel NUMBER` takes one back"
        )));
    }
    waiting.last += 1;
    let (person, name) = (person.id(), person.name());
    let request = Request { number: waiting.last, asked_ms: now_ms(), person, name, runs };
    waiting.requests.push(request.clone());
    file.replace(waiting)?;
    Ok(request)
}

/// Takes a request out, for its purge.
pub(super) fn confirm(admin: &Admin, person: &Person, number: u32) -> Result<Request, AdminError> {
    let mut file = admin.purges.lock();
    let mut waiting = file.value()?.clone();
    let request = taken(&mut waiting, number)?;
    if request.person == person.id() {
        return Err(AdminError::Purge(format!(
            "request {number} is your own ({}): another person confirms it, under an account of his own",
            request.name
        )));
    }
    file.replace(waiting)?;
    Ok(request)
}

/// Takes a request back.
pub(super) fn cancel(admin: &Admin, number: u32) -> Result<(), AdminError> {
    let mut file = admin.purges.lock();
    let mut waiting = file.value()?.clone();
    taken(&mut waiting, number)?;
    Ok(file.replace(waiting)?)
}

fn taken(waiting: &mut Requests, number: u32) -> Result<Request, AdminError> {
    let place = waiting.requests.iter().position(|request| request.number == number);
    let place = place.ok_or_else(|| {
        AdminError::Purge(format!(
            "no request {number} waits: `janus-server trash list` shows them"
        ))
    })?;
    Ok(waiting.requests.remove(place))
}
