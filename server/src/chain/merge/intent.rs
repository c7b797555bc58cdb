//! What is still to be done of a merge, and the renames that do it.

use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{MergeError, set_identity};
use crate::{
    chain::{
        FORMAT, History, Run, Snapshot,
        table::{HEADER_BYTES, Table, TableError},
    },
    image::{Image, ImageError},
    storage::{Access, Disk, File},
};

/// A link's way out of its chain, decided: it is finished whatever happens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// Version of this file.
    pub format: u32,
    /// The link.
    pub link: Snapshot,
    /// What becomes of it.
    pub ending: Ending,
}

/// What becomes of a link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// Nothing builds on it: its files go.
    Remove,
    /// A child takes its place. The link goes, unless it has more children.
    Switch {
        /// How.
        switch: Box<Switch>,
        /// It has more children.
        link_stays: bool,
    },
}

/// Merged files that only need the child's id and names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// The child as its manifest will name it.
    pub merged: Snapshot,
    /// What the merged image names as its parent.
    pub parent: Option<Uuid>,
    /// The merged image, relative to the machine's folder.
    pub image_from: String,
    /// The merged table, relative to the machine's folder.
    pub table_from: String,
    /// Header of the merged table, which may still need it; in hex.
    pub table_header: String,
}

impl Intent {
    /// A link without children goes.
    pub fn remove(link: Snapshot) -> Self {
        Self { format: FORMAT, link, ending: Ending::Remove }
    }

    /// A child takes the link's place.
    pub fn switch(link: Snapshot, switch: Switch, link_stays: bool) -> Self {
        Self {
            format: FORMAT,
            link,
            ending: Ending::Switch { switch: Box::new(switch), link_stays },
        }
    }

    /// The child that takes the link's place.
    pub fn switching(&self) -> Option<&Switch> {
        match &self.ending {
            Ending::Remove => None,
            Ending::Switch { switch, .. } => Some(switch),
        }
    }

    /// True when the link's files go.
    pub fn link_goes(&self) -> bool {
        !matches!(self.ending, Ending::Switch { link_stays: true, .. })
    }

    /// The runs that change: with the child's new parent, and without the link.
    pub fn changed_runs(&self, history: &History) -> (Option<Run>, Option<Run>) {
        let child = self.switching().and_then(|switch| {
            let mut run = Run::clone(&history.link(switch.merged.id)?.run);
            let known = run.snapshots.iter_mut().find(|known| known.id == switch.merged.id)?;
            *known = switch.merged.clone();
            Some(run)
        });
        let trashed = || {
            let mut run = Run::clone(&history.link(self.link.id)?.run);
            run.snapshots.retain(|known| known.id != self.link.id);
            Some(run)
        };
        (child, self.link_goes().then(trashed).flatten())
    }
}

impl Switch {
    /// Gives the files the child's id and names. May be repeated.
    ///
    /// Until it has ended well the chain may be unreadable: nobody may open it meanwhile.
    ///
    /// # Errors
    /// As the file system says.
    pub fn rename(&self, storage: &Disk, folder: &Path) -> Result<(), MergeError> {
        let (image_from, table_from) =
            (folder.join(&self.image_from), folder.join(&self.table_from));
        if let Some(file) = open(storage, &table_from)? {
            let damaged = MergeError::table(&table_from);
            let header = self.header().map_err(&damaged)?;
            Table::write_header(&file, &header).map_err(&damaged)?;
            file.sync_data().map_err(MergeError::io("sync", &table_from))?;
        }
        if let Some(file) = open(storage, &image_from)? {
            set_identity(&file, self.merged.data_write).map_err(MergeError::image(&image_from))?;
        }
        for (from, to) in [(&table_from, &self.merged.table), (&image_from, &self.merged.image)] {
            let to = folder.join(to);
            if storage.exists(from).map_err(MergeError::io("look for", from))? {
                storage.rename(from, &to).map_err(MergeError::io("rename", from))?;
            }
            if let Some(folder) = to.parent() {
                storage.sync_folder(folder).map_err(MergeError::io("sync", folder))?;
            }
        }
        self.check(storage, &folder.join(&self.merged.image), &folder.join(&self.merged.table))
    }

    fn header(&self) -> Result<[u8; HEADER_BYTES], TableError> {
        Table::parse_header(&hex::decode(&self.table_header).unwrap_or_default())
    }

    /// Nothing may be removed before the merged files are where the manifest says.
    fn check(&self, storage: &Disk, path: &Path, table: &Path) -> Result<(), MergeError> {
        let damaged = MergeError::table(table);
        let file = storage.open(table, Access::Read).map_err(MergeError::io("open", table))?;
        if Table::read_header(&file).map_err(&damaged)? != self.header().map_err(&damaged)? {
            let reason = "the merged table is not in its place".to_owned();
            return Err(damaged(TableError::Impossible { reason }));
        }
        let file = storage.open(path, Access::Read).map_err(MergeError::io("open", path))?;
        let image = Image::open(file).map_err(MergeError::image(path))?;
        let parent = image.parent().map(|parent| parent.data_write);
        if (image.data_write(), parent) == (self.merged.data_write, self.parent) {
            return Ok(());
        }
        let reason = "the merged image is not in its place".to_owned();
        Err(MergeError::image(path)(ImageError::Impossible { reason }))
    }
}

/// A file that a step before may have renamed already.
fn open(storage: &Disk, path: &Path) -> Result<Option<File>, MergeError> {
    match storage.open(path, Access::Write) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some).map_err(MergeError::io("open", path)),
    }
}
