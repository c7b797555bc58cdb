//! The files of a session, found as they were left or begun anew.
//!
//! Their names are durable before anything is acknowledged. A crash may leave one of them without the other, a journal without
//! its header, or files of another session that had these names: then nothing was acknowledged as durable, and the
//! session begins anew.

use std::{path::Path, sync::Arc};

use janus_proto::model::Extent;

use super::{
    Index, SessionError, Trust,
    journal::{Journal, Record},
};
use crate::{
    chain::store::OpenDisk,
    storage::{Access, Disk, File},
};

pub(super) struct Files {
    pub(super) image: Arc<File>,
    journal: File,
    is_fresh: bool,
}

impl Files {
    /// Opens or makes the files of a session in a machine's folder.
    pub(super) fn open(
        storage: &Disk,
        folder: &Path,
        disk: &OpenDisk,
    ) -> Result<Self, SessionError> {
        let (path, image_path) = (folder.join(disk.journal()), folder.join(disk.partial("vhdx")));
        let journal = storage.open(&path, Access::Create);
        let journal = journal.map_err(SessionError::io("open", &path))?;
        let image = storage.open_data(&image_path, Access::Create);
        let image = image.map_err(SessionError::io("open", &image_path))?;
        let size = image.metadata().map_err(SessionError::io("read", &image_path))?;
        let is_ours = Journal::is_of(&journal, disk.session);
        // A journal without its image would promise blocks that are not there.
        let is_fresh =
            size.length_bytes == 0 || !is_ours.map_err(SessionError::io("read", &path))?;
        if is_fresh {
            image.set_len(0).map_err(SessionError::io("cut", &image_path))?;
        }
        let disk_folder = folder.join(disk.disk.as_str());
        storage.sync_folder(&disk_folder).map_err(SessionError::io("sync", &disk_folder))?;
        Ok(Self { image: Arc::new(image), journal, is_fresh })
    }

    /// Reads the journal: what it says, and the blocks that were written since the last sync began.
    pub(super) fn read_journal(
        self,
        disk: &OpenDisk,
        trust: Trust,
        has_head: bool,
    ) -> Result<(Journal, Index, Vec<Extent>), SessionError> {
        let path = self.journal.path().to_owned();
        let (mut index, mut unsynced) = (Index::default(), Vec::new());
        let take = |record: Record| {
            index.note(&record.extents, record.hashes_at, record.settled, has_head);
            if record.synced {
                index.marks.durable = record.settled;
                // Marks only grow: records with a higher one came after the sync began, those with the same may have.
                unsynced.retain(|(settled, _)| *settled >= record.settled);
            } else {
                unsynced.push((record.settled, record.extents));
            }
        };
        let journal = if self.is_fresh {
            Journal::create(self.journal, disk.session, disk.size_bytes)
        } else {
            let synced_only = trust == Trust::Synced;
            Journal::open(self.journal, disk.session, disk.size_bytes, synced_only, take)
        };
        let journal = journal.map_err(SessionError::io("open", &path))?;
        let unsynced = unsynced.into_iter().flat_map(|(_, extents)| extents).collect();
        Ok((journal, index, unsynced))
    }
}
