//! Damage, and the checks that find it.

use janus_proto::ids::{BLOCK_BYTES, DiskId};
use janus_server::{
    chain::{health::Health, opened::open_image},
    image::Source,
    storage::{Access, Disk},
    verify::{CheckError, Way, check_image, pace::Limit},
};
use tokio_util::sync::CancellationToken;

use super::World;
use crate::promises::Promise;

impl World {
    /// Flips a bit of a block, in the oldest image of the disk that has it.
    pub fn damage(&mut self, disk: &str, block: u64) -> Result<(), String> {
        let disk: DiskId = disk.parse().unwrap();
        let (storage, machine) = (self.storage.clone(), self.machine.clone());
        let folder = self.runs()?.store().machine_folder(&machine);
        let place = self.there()?.into_iter().rev().filter(|held| held.snapshot().disk == disk);
        let place = place.into_iter().find_map(|held| {
            // Not through the store's disk: looking for a place is no operation of it.
            let image = open_image(&Disk::default(), &folder, held.snapshot()).unwrap();
            let range = block * BLOCK_BYTES..block * BLOCK_BYTES + 1;
            match image.extents(range).unwrap().first() {
                Some((_, Source::File(at))) => Some((folder.join(&held.snapshot().image), *at)),
                _ => None,
            }
        });
        let (path, at) = place.ok_or("no image has the block")?;
        self.promise(Promise::Damaged { disk, block });
        let mut byte = [0];
        Disk::default().open(&path, Access::Read).unwrap().read_exact_at(&mut byte, at).unwrap();
        self.until_done("damage", |_| {
            let file = storage.open(&path, Access::Write).map_err(|e| e.to_string())?;
            file.write_all_at(&[byte[0] ^ 4], at).map_err(|e| e.to_string())?;
            file.sync_data().map_err(|e| e.to_string())
        })
    }

    /// Checks all images. What is found is that one block, and it is known from then on.
    pub fn verify(&mut self) -> Result<(), String> {
        let machine = self.machine.clone();
        self.until_done("verify", |world| {
            let mut found = 0;
            for held in world.there()? {
                let limit = Limit::new(0, CancellationToken::new(), || false);
                let damage = match check_image(world.runs()?, &held, Way::Anew(1), &limit) {
                    Ok(damage) => damage,
                    Err(CheckError::Io(error)) => return Err(error.to_string()),
                    Err(error) => panic!("{error}"),
                };
                if damage.unusable.is_some() {
                    return Err(format!("{damage:?} was found"));
                }
                found += damage.blocks.blocks();
            }
            if found > 1 {
                return Err(format!("{found} damaged blocks were found"));
            }
            // Damage is kept at once; what could not be written then, later.
            if world.recorder.as_ref().is_some_and(|recorder| recorder.hit().is_some()) {
                world.runs()?.save_health();
            }
            let folder = world.runs()?.store().machine_folder(&machine);
            let known = world.runs()?.machine(&machine).ok_or("the machine is unknown")?.health();
            match Health::load(&Disk::default(), &folder, &machine) {
                Ok(kept) if kept.snapshots == known.snapshots => Ok(found),
                _ => Err("what was found is not kept".into()),
            }
        })
        .map(|found| {
            if found > 0 {
                self.promise(Promise::Found);
            }
        })
    }
}
