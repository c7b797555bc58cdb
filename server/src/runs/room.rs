//! Whether the purge of a run has room: merging writes before it frees, and on a full disk a dropped run that can't be merged
//! is lost for nothing.

use janus_proto::ids::BackupId;

use super::{
    Machine, PurgeOptions, Runs,
    purge::{SLACK_BYTES, Wait},
};
use crate::chain::{
    Held,
    merge::{MergeError, Pair, Way},
};

impl Runs {
    /// Why a run that is dropped now could not be purged for lack of room. `None`: it can, or something else decides that.
    ///
    /// A merge frees what it took, or more, so runs may be asked about one by one.
    pub fn lacks_room(
        &self,
        machine: &Machine,
        backup: BackupId,
        options: &PurgeOptions,
    ) -> Option<Wait> {
        let _files = machine.keep_files();
        if machine.unswitched().is_some() {
            return None;
        }
        let run = machine.live_run(backup)?;
        Held::all(&run).find_map(|link| {
            // What can't be asked is left to the purge.
            self.lacks_room_for(machine, &link, options).unwrap_or(None)
        })
    }

    fn lacks_room_for(
        &self,
        machine: &Machine,
        link: &Held,
        options: &PurgeOptions,
    ) -> Result<Option<Wait>, MergeError> {
        let children = machine.history(|history| history.children(link.snapshot().id));
        let Some(child) = children.iter().min_by_key(|held| held.run.sequence) else {
            return Ok(None);
        };
        let Ok((free_bytes, _)) = self.store.space() else { return Ok(None) };
        let free_bytes = free_bytes.saturating_sub(options.reserve_bytes);
        let folder = self.store.machine_folder(&machine.key);
        let (storage, child) = (self.store.storage(), child.snapshot());
        let pair = Pair { storage, folder: &folder, link: link.snapshot(), child };
        // The child is all that can be written: mostly that answers it without a look at tables.
        let table = storage.metadata(&folder.join(&child.table)).ok().flatten();
        let most = child.image_allocated_bytes + table.map_or(0, |table| table.length_bytes * 2);
        if free_bytes > most.saturating_add(SLACK_BYTES) {
            return Ok(None);
        }
        let way = match !options.copy && pair.can_clone().unwrap_or(false) {
            true => Way::Clone,
            false => Way::InPlace,
        };
        let needed_bytes = pair.needed_bytes(way)?.saturating_add(SLACK_BYTES);
        Ok((free_bytes < needed_bytes).then_some(Wait::Space { needed_bytes, free_bytes }))
    }
}
