//! What a rebuild does, one step at a time. Every step may be repeated.

use std::path::{Path, PathBuf};

use janus_proto::ids::MachineKey;
use uuid::Uuid;

use super::super::{Counters, FORMAT, MACHINE, MachineFile, StoreError, exists, put_aside, write};
use crate::{chain::health::Health, storage::Disk};

/// One change of the folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The store below this path gets a new generation.
    Renew(PathBuf),
    /// A file or folder goes to where it belongs, or out of the way.
    Move {
        /// Where it is.
        from: PathBuf,
        /// Where nothing is yet.
        to: PathBuf,
        /// For people.
        why: &'static str,
    },
    /// A machine's own file is made again.
    MakeMachine {
        /// The machine's folder.
        folder: PathBuf,
        /// The machine.
        machine: MachineKey,
        /// Highest use counter that its folder knows.
        use_counter: u64,
    },
    /// All images are to be proven again, and of those that come back nothing is known.
    ForgetProofs {
        /// The machine's folder.
        folder: PathBuf,
        /// The machine.
        machine: MachineKey,
        /// Data write ids of images that come back.
        returning: Vec<Uuid>,
    },
}

impl Step {
    /// For people; paths below `root` without it.
    pub fn describe(&self, root: &Path) -> String {
        let short = |path: &Path| path.strip_prefix(root).unwrap_or(path).display().to_string();
        match self {
            Self::Renew(_) => "the store gets a new generation".into(),
            Self::Move { from, to, why } => format!("{} -> {}: {why}", short(from), short(to)),
            Self::MakeMachine { folder, use_counter, .. } => {
                let path = short(&folder.join(MACHINE));
                format!("{path} is made again, with use counter {use_counter}")
            }
            Self::ForgetProofs { machine, .. } => {
                format!("all images of {machine} count as not yet checked")
            }
        }
    }
}

/// Does steps in their order.
pub(super) fn carry_out(storage: &Disk, steps: &[Step]) -> Result<(), StoreError> {
    for step in steps {
        tracing::info!(?step, "rebuild");
        carry_out_one(storage, step)?;
    }
    Ok(())
}

fn carry_out_one(storage: &Disk, step: &Step) -> Result<(), StoreError> {
    match step {
        // Was done before the survey.
        Step::Renew(_) => Ok(()),
        Step::Move { from, to, .. } => move_durably(storage, from, to),
        Step::MakeMachine { folder, machine, use_counter } => {
            let path = folder.join(MACHINE);
            if exists(storage, &path)? {
                put_aside(storage, &path)?;
            }
            let counters = Counters { use_counter: *use_counter, ..Counters::default() };
            let machine = machine.clone();
            write(storage, &path, &MachineFile { format: FORMAT, machine, counters })
        }
        Step::ForgetProofs { folder, machine, returning } => {
            let mut health = Health::load(storage, folder, machine)?;
            forget(&mut health, returning);
            health.save(storage, folder, machine)
        }
    }
}

/// What is known of a copy was learnt of its original.
pub(super) fn forget(health: &mut Health, returning: &[Uuid]) {
    health.images.retain(|image, _| !returning.contains(image));
    for known in health.images.values_mut() {
        known.proven_ms = 0;
        known.check = None;
    }
}

fn move_durably(storage: &Disk, from: &Path, to: &Path) -> Result<(), StoreError> {
    let folders = [to, from].map(|path| path.parent().unwrap_or(path));
    storage.make_folder(folders[0]).map_err(StoreError::io("make", folders[0]))?;
    storage.rename(from, to).map_err(StoreError::io("move", from))?;
    for folder in folders {
        storage.sync_folder(folder).map_err(StoreError::io("sync", folder))?;
    }
    Ok(())
}
