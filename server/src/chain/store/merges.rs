//! Merges on disk: intents in `<machine>/.merge/<link>.json`, and the steps that finish one.
//!
//! ```text
//! 1  the merged files get the child's id and names     nobody may open the chain from here
//! 2  the child's manifest names the link's parent      to here
//! 3  the trash's manifest goes on without the link; the last one takes it away
//! 4  the link's files are removed, if it had no child left
//! 5  the intent is removed
//! ```
//!
//! Each step may be repeated, and the first two are done again at start before anything is opened.

use std::path::{Path, PathBuf};

use janus_proto::ids::MachineKey;

use super::{
    Counters, Faults, MachineFile, MachineState, RUNS, Store, StoreError, files_in, list,
    put_aside, read, trash, write,
};
use crate::{
    chain::{
        Run,
        merge::{Intent, MergeError, PARTIAL},
        stub,
    },
    storage::Disk,
};

pub(super) const MERGES: &str = ".merge";

impl Store {
    /// Makes an intent durable: from here on it will happen.
    ///
    /// # Errors
    /// As the file system says; the intent may then be durable or not.
    pub fn save_intent(&self, machine: &MachineKey, intent: &Intent) -> Result<(), StoreError> {
        let folder = self.machine_folder(machine).join(MERGES);
        self.storage.make_folder(&folder).map_err(StoreError::io("make", &folder))?;
        write(&self.storage, &self.intent_path(machine, intent), intent)
    }

    /// Forgets an intent, durably.
    ///
    /// # Errors
    /// As the file system says.
    pub fn remove_intent(&self, machine: &MachineKey, intent: &Intent) -> Result<(), StoreError> {
        let path = self.intent_path(machine, intent);
        self.storage.remove(&path).map_err(StoreError::io("remove", &path))?;
        // An intent that came back after a crash would be followed again.
        let folder = self.machine_folder(machine).join(MERGES);
        self.storage.sync_folder(&folder).map_err(StoreError::io("sync", &folder))
    }

    /// Steps 1 and 2. `child` is the child's run as it will be, and whether it is in the trash.
    ///
    /// # Errors
    /// As the file system says; to be repeated.
    pub fn switch(
        &self,
        machine: &MachineKey,
        intent: &Intent,
        child: Option<(&Run, bool)>,
    ) -> Result<(), StoreError> {
        let folder = self.machine_folder(machine);
        if let Some(switch) = intent.switching() {
            switch.rename(&self.storage, &folder).map_err(store_error)?;
        }
        if let Some((run, in_trash)) = child {
            let place = if in_trash { trash::TRASH } else { RUNS };
            write(&self.storage, &trash::manifest_path(&folder.join(place), run), run)?;
        }
        Ok(())
    }

    /// Steps 3 to 5. `rest` is the link's run without it, `counters` those of the machine with the run's number.
    ///
    /// # Errors
    /// As the file system says; to be repeated.
    pub fn clear_away(
        &self,
        machine: &MachineKey,
        intent: &Intent,
        rest: Option<&Run>,
        counters: Counters,
    ) -> Result<(), StoreError> {
        let folder = self.machine_folder(machine);
        match rest {
            Some(run) if run.snapshots.is_empty() => {
                // No later run may get its number.
                self.save_counters(machine, counters)?;
                self.remove_trashed(run)?;
            }
            Some(run) => {
                write(&self.storage, &trash::manifest_path(&folder.join(trash::TRASH), run), run)?
            }
            None => {}
        }
        if intent.link_goes() {
            for path in stub::files(&folder, &intent.link) {
                self.storage.remove(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
        // All of it before the intent goes: what comes back after a crash would have nobody who removes it.
        for path in [folder.join(trash::TRASH), folder.join(intent.link.disk.as_str())] {
            self.storage.sync_folder(&path).map_err(StoreError::io("sync", &path))?;
        }
        self.remove_intent(machine, intent)
    }

    /// Removes what merges have left that were not decided.
    ///
    /// # Errors
    /// As the file system says.
    pub fn remove_partials(&self, machine: &MachineKey) -> Result<(), StoreError> {
        remove_partials(&self.storage, &self.machine_folder(machine), &Faults::default())
    }

    fn intent_path(&self, machine: &MachineKey, intent: &Intent) -> PathBuf {
        self.machine_folder(machine).join(MERGES).join(format!("{}.json", intent.link.id))
    }

    /// Finishes what an earlier process began with this machine's merges; what fails is kept for later.
    pub(super) fn finish_merges(
        &self,
        file: &mut MachineFile,
        state: &mut MachineState,
    ) -> Result<(), StoreError> {
        let folder = self.machine_folder(&file.machine);
        for path in files_in(&self.storage, &folder.join(MERGES), "json")? {
            let intent = match read::<Intent>(&self.storage, &path) {
                Ok(Some(intent)) => intent,
                Ok(None) => continue,
                Err(error @ StoreError::Newer { .. }) => return Err(error),
                Err(error) => {
                    tracing::error!(%error, "a merge that was begun can't be finished");
                    put_aside(&self.storage, &path)?;
                    state.incomplete = true;
                    continue;
                }
            };
            if let Err(error) = self.finish_merge(file, state, &intent) {
                tracing::error!(%error, machine = %file.machine, "a merge that was begun can't be finished now");
                state.unfinished.push(intent);
            }
        }
        if state.unfinished.is_empty() {
            remove_partials(&self.storage, &folder, &state.faults)?;
        }
        Ok(())
    }

    fn finish_merge(
        &self,
        file: &mut MachineFile,
        state: &mut MachineState,
        intent: &Intent,
    ) -> Result<(), StoreError> {
        let (child, rest) = intent.changed_runs(&state.history);
        let child = child.as_ref().map(|run| (run, !state.history.is_live(run.sequence)));
        self.switch(&file.machine, intent, child)?;
        let counters = rest.as_ref().map_or(file.counters, |run| file.counters.after(run));
        self.clear_away(&file.machine, intent, rest.as_ref(), counters)?;
        file.counters = counters;
        state.counters = counters;
        state.history.switch(intent);
        state.history.clear_away(intent);
        Ok(())
    }
}

impl Counters {
    /// With the number and time of a run that goes for good.
    pub fn after(self, run: &Run) -> Self {
        Self {
            purged_sequence: self.purged_sequence.max(run.sequence),
            purged_ms: self.purged_ms.max(run.committed_ms),
            ..self
        }
    }
}

/// Copies that no intent speaks of: of merges that were not ready.
fn remove_partials(storage: &Disk, folder: &Path, faults: &Faults) -> Result<(), StoreError> {
    for disk in faults.readable_disks(storage, folder)? {
        for path in list(storage, &disk)? {
            if path.as_os_str().as_encoded_bytes().ends_with(PARTIAL.as_bytes()) {
                storage.remove(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
    }
    Ok(())
}

fn store_error(error: MergeError) -> StoreError {
    match error {
        MergeError::Io { action, path, source } => StoreError::Io { action, path, source },
        MergeError::Image { path, source } => {
            StoreError::Damaged { path, reason: source.to_string() }
        }
        MergeError::Table { path, source } => {
            StoreError::Damaged { path, reason: source.to_string() }
        }
        other => StoreError::Damaged { path: PathBuf::new(), reason: other.to_string() },
    }
}
