//! Chains with a file missing: looked for when a server starts, and named.
//!
//! Only folders are listed, so this takes as long whatever is stored. What is found is noted as damage, so that it is told
//! as such, and nothing is built on such a chain; a check of the image takes the note back once the file is there again.

use std::{collections::HashSet, io};

use janus_proto::ids::DiskId;

use super::{Machine, Runs};
use crate::{
    chain::{
        Held,
        gaps::{self, Gaps},
        health::Damage,
    },
    verify::image::ImageCheck,
};

impl Runs {
    /// What is missing of a machine's chains now.
    ///
    /// # Errors
    /// As the file system says.
    pub fn gaps(&self, machine: &Machine) -> io::Result<Gaps> {
        let _files = machine.keep_files();
        let disks: HashSet<DiskId> = machine
            .history(|history| history.links().map(|held| held.snapshot().disk.clone()).collect());
        let folder = self.store.machine_folder(&machine.key);
        let mut there = HashSet::new();
        for disk in disks {
            for path in self.store.storage().list(&folder.join(disk.as_str()))? {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                there.insert(format!("{disk}/{name}"));
            }
        }
        Ok(machine.history(|history| gaps::find(history, &there)))
    }

    /// Notes and logs what is missing of all chains. Meant for the start of a server.
    pub fn look_for_missing(&self) {
        for machine in self.machines() {
            // Until a merge is finished its files have other names than the manifests say.
            if machine.unswitched().is_some() || machine.check_history().is_err() {
                continue;
            }
            match self.gaps(&machine) {
                Ok(gaps) => self.note_gaps(&machine, &gaps),
                Err(error) => {
                    tracing::error!(%error, machine = %machine.key, "whether files are missing is unknown");
                }
            }
        }
    }

    fn note_gaps(&self, machine: &Machine, gaps: &Gaps) {
        for gap in &gaps.snapshots {
            tracing::error!(machine = %machine.key, "{}", gap.describe());
        }
        let found = gaps.links.iter().filter_map(|held| {
            let damage = self.missing_of(machine, held)?;
            Some((held.clone(), damage))
        });
        self.note_missing(machine, found.collect());
        self.look_again(machine);
    }

    fn missing_of(&self, machine: &Machine, held: &Held) -> Option<Damage> {
        let parent = held.snapshot().parent.and_then(|id| machine.link(id));
        let folder = self.store.machine_folder(&machine.key);
        let parent = parent.as_ref().map(Held::snapshot);
        let opened = ImageCheck::open(self.store.storage(), &folder, held.snapshot(), parent);
        opened.ok()?.err()
    }
}
