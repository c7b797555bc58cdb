//! Runs that come in a carried folder, which lies on another disk.

use std::sync::Arc;

use janus_proto::{
    carried::{Claim, DiskWriter, Manifest},
    channel::{ConnectOptions, Dial, Dialing, Target},
    ids::{BackupId, SEGMENT_BYTES, ServerId},
    proof::Statement,
};
use janus_server::{
    carry::{self, CarryError, NewRun},
    chain::Held,
    config::Fill,
    fill::Filler,
    image::Geometry,
    runs::now_ms,
    storage::Disk,
};

use tokio_util::sync::CancellationToken;

use super::World;
use crate::promises::Promise;

/// Connects to nobody.
struct Nobody;

impl Dial for Nobody {
    fn dial<'a>(&'a self, _: &'a Target, _: &'a ConnectOptions) -> Dialing<'a> {
        Box::pin(std::future::pending())
    }

    fn prove(&self, _: &Statement, _: Option<&ServerId>) -> Option<String> {
        None
    }
}

/// A folder with the disks as they are.
pub(super) struct Carried {
    folder: tempfile::TempDir,
    manifest: Manifest,
}

impl World {
    /// Imports the disks as they are now, or goes on with the import that was begun.
    pub fn import(&mut self) -> Result<(), String> {
        self.take_in(u64::MAX)?;
        self.carried = None;
        Ok(())
    }

    /// Begins an import and stops it after the first segment.
    pub fn import_some(&mut self) -> Result<(), String> {
        self.take_in(1)
    }

    /// What was carried and not taken in is gone.
    pub fn forget_carried(&mut self) {
        self.carried = None;
    }

    /// Imports only the hashes of the disks as they are now.
    pub fn import_stubs(&mut self) -> Result<(), String> {
        self.take_in_as(u64::MAX, true)?;
        self.carried = None;
        Ok(())
    }

    /// Fills stubs with what newer snapshots have, and tells what else is to be asked of the client.
    pub fn fill(&mut self) -> Result<(), String> {
        self.until_done("fill", |world| {
            world.runs()?;
            let filler = Filler {
                runs: Arc::clone(world.runs.as_ref().unwrap()),
                own: "server".parse().unwrap(),
                dialer: Arc::new(Nobody),
                janus_urls: tokio::sync::watch::channel(Vec::new()).1,
                settings: Fill { ask_clients_after_seconds: 0, ..Fill::default() },
            };
            filler.once(&CancellationToken::new());
            world.check()?;
            // It is tried again for ever.
            let machine = world.machine.clone();
            let known = world.runs()?.machine(&machine).ok_or("no machine")?;
            let health = known.health();
            let is_asked = |held: &Held| health.damage(held.snapshot()).is_some();
            match known.stubs().iter().all(is_asked) {
                true => Ok(()),
                false => Err("what a stub lacks isn't asked of the client".into()),
            }
        })
    }

    /// The same, when all of them must be full then.
    pub fn fill_up(&mut self) -> Result<(), String> {
        self.until_done("fill up", |world| {
            world.fill()?;
            world.has_no_stubs()
        })
    }

    /// There must be no stubs.
    pub fn has_no_stubs(&mut self) -> Result<(), String> {
        match self.runs()?.stubs().is_empty() {
            true => Ok(()),
            false => Err("a stub isn't full".into()),
        }
    }

    fn take_in(&mut self, until: u64) -> Result<(), String> {
        self.take_in_as(until, false)
    }

    /// Imports until so many bytes are done.
    fn take_in_as(&mut self, until: u64, stubs: bool) -> Result<(), String> {
        let carried = match self.carried.take() {
            Some(carried) => carried,
            None => self.write_folder(),
        };
        self.promise(Promise::Trying {
            backup: carried.manifest.run,
            contents: self.contents.clone(),
        });
        let done = self.until_done("import", |world| {
            world.runs()?;
            let runs = Arc::clone(world.runs.as_ref().unwrap());
            let new = NewRun { stubs, ..carried.opened(&world.machine) };
            match carry::import(&runs, &new, &|done, _| done < until) {
                Ok(imported) => {
                    let run = imported.run;
                    let of = |s: &janus_server::chain::Snapshot| (s.id, s.disk.clone());
                    let snapshots = run.snapshots.iter().map(of).collect();
                    let backup = carried.manifest.run;
                    world.promise(Promise::Committed { backup, snapshots });
                    Ok(())
                }
                Err(CarryError::Stopped) if until < u64::MAX => Ok(()),
                Err(error) => Err(error.to_string()),
            }
        });
        self.carried = Some(carried);
        done
    }

    fn write_folder(&self) -> Carried {
        let folder = crate::folder();
        let claim =
            Claim::take(&Disk::default(), folder.path(), self.contents.keys().cloned()).unwrap();
        let entries = self.contents.iter().map(|(disk, content)| {
            let disk_bytes = content.bytes.len() as u64;
            let geometry = Geometry { disk_bytes, logical_sector_bytes: 512 };
            let mut writer = DiskWriter::create(&claim, disk, geometry).unwrap();
            let bytes = content.bytes.chunks(SEGMENT_BYTES as usize);
            for ((segment, hashes), bytes) in content.segments().zip(bytes) {
                writer.segment(segment, hashes, bytes).unwrap();
            }
            writer.finish(1, 0).unwrap()
        });
        let entries = entries.collect();
        // Newer than what is there, by whole milliseconds.
        std::thread::sleep(std::time::Duration::from_millis(2));
        let manifest =
            Manifest::new(BackupId::new(), self.machine.clone(), now_ms(), b"seal", entries);
        claim.finish(&manifest).unwrap();
        Carried { folder, manifest }
    }
}

impl Carried {
    fn opened(&self, machine: &janus_proto::ids::MachineKey) -> NewRun {
        let new = NewRun::carried(&Disk::default(), self.folder.path(), &self.manifest).unwrap();
        NewRun { machine: machine.clone(), ..new }
    }
}
