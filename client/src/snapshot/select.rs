//! Which snapshot is meant: by its id, or the newest of a disk, or the newest until a time, on any server.

use std::time::SystemTime;

use janus_proto::{
    error::WireError,
    ids::{DiskId, MAX_DISK_BYTES, MachineKey, ServerId, SnapshotId},
    pb::Snapshot,
    show::date,
};
use jiff::{Timestamp, civil, tz::TimeZone};

use crate::{
    catalog::{self, Found, Listing, Query},
    link::LinkError,
    snapshot::order,
    tables,
    ways::Ways,
};

/// Why nothing was chosen.
#[derive(Debug, thiserror::Error)]
pub enum SelectError {
    /// Nothing fits what was asked for.
    #[error("there is no snapshot {wanted}{hint}; `janus-client list` shows what there is")]
    Unknown {
        /// As asked for.
        wanted: String,
        /// Servers that could not be asked.
        hint: String,
    },
    /// A server's clock was wrong: which snapshot is the newest can't be told by their times.
    #[error(
        "snapshot {snapshot} on server {server} is of {}, in the future: a clock was wrong, and a snapshot of another server may be newer; choose by `janus-client list`: its ID, or --server NAME",
        date(*committed_ms)
    )]
    Future {
        /// The newest by its time.
        snapshot: String,
        /// Its server.
        server: String,
        /// Its time, in Unix milliseconds.
        committed_ms: i64,
    },
    /// It exists where nobody answers.
    #[error(
        "snapshot {snapshot} of {disk} is on server {server}, which can't be reached now{hint}"
    )]
    Away {
        /// Its id.
        snapshot: String,
        /// Its disk.
        disk: String,
        /// Its server.
        server: String,
        /// What can be done.
        hint: &'static str,
    },
    /// One disk was needed, and there are several.
    #[error("{machine} has several disks: {}; say which: {machine}/{}", disks.join(", "), disks[0])]
    Several {
        /// The machine.
        machine: MachineKey,
        /// Its disks, two at least.
        disks: Vec<String>,
    },
    /// A snapshot's id says all there is to say.
    #[error(
        "a snapshot's id names one snapshot: --at and --snapshot choose among those of a disk or machine"
    )]
    TooMuch,
    /// No time.
    #[error(
        "--at {text:?} is no time; write it as `janus-client list` prints it (UTC): 2026-11-20, \"2026-11-20 22:00\", or with a zone: 2026-11-20T22:00+01:00"
    )]
    Time {
        /// As asked for.
        text: String,
    },
    /// No name.
    #[error(transparent)]
    Name(#[from] WireError),
    /// A call failed.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// Which of the snapshots of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Which {
    /// The newest.
    Newest,
    /// The newest until then, in Unix milliseconds.
    At(i64),
    /// This one.
    Id(SnapshotId),
}

/// What is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Whose; `None`: our own.
    pub machine: Option<MachineKey>,
    /// Which disk; `None`: of each, or the id says it.
    pub disk: Option<DiskId>,
    /// Which of its snapshots.
    pub which: Which,
    /// Only from this server.
    pub server: Option<ServerId>,
}

impl Selection {
    /// What `what` (`DISK`, `USER/MACHINE`, `USER/MACHINE/DISK`, or a snapshot's id) means with `--at` and `--snapshot`.
    ///
    /// # Errors
    /// When it is none of these.
    pub fn parse(
        what: &str,
        at: Option<&str>,
        snapshot: Option<&str>,
        server: Option<ServerId>,
    ) -> Result<Self, SelectError> {
        if let Ok(id) = what.parse::<SnapshotId>() {
            let alone = at.is_none() && snapshot.is_none();
            let which = Which::Id(id);
            let of_id = Self { machine: None, disk: None, which, server };
            return alone.then_some(of_id).ok_or(SelectError::TooMuch);
        }
        let (machine, disk) = match what.split('/').collect::<Vec<_>>()[..] {
            [user, machine] => (Some(MachineKey::new(user, machine)?), None),
            [user, machine, disk] => (Some(MachineKey::new(user, machine)?), Some(disk.parse()?)),
            _ => (None, Some(what.parse()?)),
        };
        let which = match (at, snapshot) {
            (None, None) => Which::Newest,
            (Some(time), None) => Which::At(until(time)?),
            (None, Some(id)) => Which::Id(id.parse()?),
            (Some(_), Some(_)) => return Err(SelectError::TooMuch),
        };
        Ok(Self { machine, disk, which, server })
    }

    /// Another snapshot of the same machine, on any server.
    ///
    /// # Errors
    /// When that is no id.
    pub fn other(&self, id: &str) -> Result<Self, SelectError> {
        let which = Which::Id(id.parse()?);
        Ok(Self { machine: self.machine.clone(), disk: None, which, server: None })
    }

    /// Finds the one snapshot that is meant.
    ///
    /// # Errors
    /// When there is none that can be had, or one of each of several disks.
    pub async fn find(&self, ways: &Ways) -> Result<Found, SelectError> {
        self.only(self.find_disks(ways).await?)
    }

    fn only(&self, mut found: Vec<Found>) -> Result<Found, SelectError> {
        match (found.pop(), &self.machine) {
            (Some(one), _) if found.is_empty() => Ok(one),
            (Some(last), Some(machine)) => {
                found.push(last);
                let disks = found.into_iter().map(|found| found.snapshot.disk_id).collect();
                Err(SelectError::Several { machine: machine.clone(), disks })
            }
            _ => Err(self.unknown(&Listing::default())),
        }
    }

    /// Finds the one snapshot that is meant, also where its server can't be reached: others may have parts of it. One that can
    /// be had is preferred to a newer one that can't.
    ///
    /// # Errors
    /// When there is none, or one of each of several disks.
    pub async fn find_away(&self, ways: &Ways) -> Result<Found, SelectError> {
        self.only(self.find_all(ways).await?)
    }

    /// Finds a snapshot of each disk that is meant, one at least, in the order of the disks' names.
    ///
    /// # Errors
    /// When there is none, or one that is meant can't be had.
    pub async fn find_disks(&self, ways: &Ways) -> Result<Vec<Found>, SelectError> {
        self.find_all(ways).await?.into_iter().map(reachable).collect()
    }

    /// The same, whether they can be had or not: others may have parts of them.
    ///
    /// # Errors
    /// When there is none.
    pub async fn find_all(&self, ways: &Ways) -> Result<Vec<Found>, SelectError> {
        let query = Query {
            machine: self.machine.clone(),
            disk: self.disk.clone(),
            server: self.server.clone(),
        };
        if let Which::Id(id) = self.which {
            let found = match catalog::find(ways, id, &query).await? {
                Some(found) => Some(found),
                None => find_mirrored(ways, id, &query).await?,
            };
            let is_meant = |found: &Found| {
                let wanted = self.disk.as_ref().map(DiskId::as_str);
                wanted.is_none_or(|disk| disk == found.snapshot.disk_id)
            };
            let found = found.filter(is_meant);
            let found = found.ok_or_else(|| self.unknown(&Listing::default()))?;
            return Ok(vec![found]);
        }
        let mut listing = catalog::list(ways, &query).await?;
        if listing.snapshots.is_empty() && !listing.unreachable.is_empty() {
            let mirrored = tables::list(ways, &query, &listing).await;
            tables::add_unknown(&mut listing, &mirrored);
        }
        let snapshots = std::mem::take(&mut listing.snapshots);
        let mut disks: Vec<_> = snapshots.iter().map(|s| s.disk_id.clone()).collect();
        disks.sort_unstable();
        disks.dedup();
        let mut found = Vec::with_capacity(disks.len());
        for disk in disks {
            let of_disk: Vec<_> = snapshots.iter().filter(|s| s.disk_id == disk).cloned().collect();
            let of_time = match self.which {
                Which::At(ms) => of_disk.into_iter().filter(|s| s.committed_ms <= ms).collect(),
                _ => {
                    check_clock(&of_disk, SystemTime::now())?;
                    of_disk
                }
            };
            let Some(snapshot) = newest(of_time) else { continue };
            found.push(listing.found(snapshot));
        }
        if found.is_empty() {
            return Err(self.unknown(&listing));
        }
        Ok(found)
    }

    fn unknown(&self, listing: &Listing) -> SelectError {
        let away: Vec<_> = listing.unreachable.iter().map(|away| away.server_id.as_str()).collect();
        let hint = match away.is_empty() {
            true => String::new(),
            false => {
                format!(" on the servers that answer ({} can't be reached)", away.join(", "))
            }
        };
        SelectError::Unknown { wanted: self.to_string(), hint }
    }
}

impl std::fmt::Display for Selection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Which::Id(id) = &self.which {
            write!(f, "{id} ")?;
        }
        match (&self.machine, &self.disk, &self.which) {
            (None, None, Which::Id(_)) => {}
            (machine, disk, _) => {
                let machine = machine.as_ref().map(ToString::to_string);
                let disk = disk.as_ref().map(|disk| format!("disk {disk}"));
                let of: Vec<_> = machine.into_iter().chain(disk).collect();
                write!(f, "of {}", of.join(", "))?;
            }
        }
        match &self.which {
            Which::At(ms) => write!(f, " until {}", date(*ms)),
            _ => Ok(()),
        }
    }
}

/// The last millisecond that a time means: a date means all of it.
fn until(text: &str) -> Result<i64, SelectError> {
    let text = text.trim().trim_end_matches("UTC").trim_end();
    let instant = |time: civil::DateTime| TimeZone::UTC.to_timestamp(time).ok();
    let ms = if let Ok(time) = text.parse::<Timestamp>() {
        Some(time.as_millisecond())
    } else if text.contains(':') {
        // To the second, as it is printed; without seconds it means all of that minute.
        let time = text.parse::<civil::DateTime>().ok().and_then(instant);
        let all = if text.matches(':').count() > 1 { 999 } else { 59_999 };
        time.map(|time| time.as_millisecond() + all)
    } else {
        let end = |date: civil::Date| instant(date.tomorrow().ok()?.at(0, 0, 0, 0));
        let time = text.parse::<civil::Date>().ok().and_then(end);
        time.map(|time| time.as_millisecond() - 1)
    };
    ms.ok_or_else(|| SelectError::Time { text: text.to_owned() })
}

fn reachable(found: Found) -> Result<Found, SelectError> {
    let snapshot = &found.snapshot;
    if snapshot.reachable {
        return Ok(found);
    }
    Err(SelectError::Away {
        snapshot: snapshot.snapshot_id.clone(),
        disk: snapshot.disk_id.clone(),
        server: snapshot.server_id.clone(),
        hint: "; `janus-client restore` brings back what other servers have of it: --partial MAP",
    })
}

/// A snapshot that no server has which answers, and janus doesn't know, but whose table some server mirrors.
async fn find_mirrored(
    ways: &Ways,
    id: SnapshotId,
    query: &Query,
) -> Result<Option<Found>, LinkError> {
    if query.server.is_some() {
        return Ok(None);
    }
    let listing = catalog::list(ways, query).await?;
    if listing.unreachable.is_empty() {
        return Ok(None);
    }
    let mirrored = tables::list(ways, query, &listing).await;
    let wanted = mirrored.into_iter().find(|one| one.snapshot.snapshot_id == id.to_string());
    Ok(wanted.map(|one| listing.found(one.snapshot)))
}

/// The newest one that can be had, of those of a disk, newest first; it is said when a newer one can't.
fn newest(snapshots: Vec<Snapshot>) -> Option<Snapshot> {
    let at = snapshots.iter().position(|snapshot| snapshot.reachable);
    match at {
        Some(0) => {}
        Some(_) => {
            let away = &snapshots[0];
            tracing::warn!(snapshot = %away.snapshot_id, server = %away.server_id, "a newer snapshot is on a server that can't be reached; taking an older one");
        }
        None => return snapshots.into_iter().next(),
    }
    snapshots.into_iter().nth(at.unwrap_or(0))
}

/// Refuses where a wrong clock may have put a snapshot before newer ones.
fn check_clock(snapshots: &[Snapshot], now: SystemTime) -> Result<(), SelectError> {
    match order::doubtful(snapshots, now) {
        None => Ok(()),
        Some(first) => Err(SelectError::Future {
            snapshot: first.snapshot_id.clone(),
            server: first.server_id.clone(),
            committed_ms: first.committed_ms,
        }),
    }
}

/// A size that memory may be planned by.
pub(crate) fn check_size(snapshot: &Snapshot) -> Result<(), WireError> {
    match snapshot.size_bytes > MAX_DISK_BYTES {
        true => Err(WireError::Invalid { field: "size_bytes", reason: "too large".into() }),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_meant_is_told_by_its_slashes() {
        let parse = |what: &str| Selection::parse(what, None, None, None).unwrap();
        assert_eq!(parse("disk").to_string(), "of disk disk");
        assert_eq!(parse("alice/laptop").to_string(), "of alice/laptop");
        assert_eq!(parse("alice/laptop/sda").to_string(), "of alice/laptop, disk sda");
        let id = SnapshotId::new().to_string();
        assert_eq!(parse(&id).to_string(), format!("{id} "));
        assert!(Selection::parse(&id, Some("2026-01-01"), None, None).is_err());
        assert!(Selection::parse("a/b/c/d", None, None, None).is_err());
        let at = Selection::parse("d", Some("2026-11-20 22:00"), None, None).unwrap();
        assert_eq!(at.to_string(), "of disk d until 2026-11-20 22:00:59");
    }

    #[test]
    fn a_time_means_all_of_what_it_says() {
        let texts = [
            ("2026-11-20", "2026-11-20 23:59:59"),
            ("2026-11-20 22:00", "2026-11-20 22:00:59"),
            ("2026-11-20 22:00:07 UTC", "2026-11-20 22:00:07"),
            ("2026-11-20T22:00:07", "2026-11-20 22:00:07"),
            ("2026-11-20T22:00+01:00", "2026-11-20 21:00:00"),
        ];
        for (text, expected) in texts {
            assert_eq!(date(until(text).unwrap()), expected, "{text}");
        }
        for text in ["", "yesterday", "22:00", "2026-13-01", "2026-11-20 25:00"] {
            assert!(until(text).is_err(), "{text}");
        }
    }
}
