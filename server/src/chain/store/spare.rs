//! Space kept for hard times, in `<image_path>/.spare`: on a disk that others have filled to the last block it is given up, so
//! that the server starts, and that retention can write down what it drops. It is taken again once there is plenty.

use std::path::Path;

use super::Store;
use crate::storage::Disk;

const SPARE: &str = ".spare";
/// Enough for the small files of a start and of a large retention run.
const SPARE_BYTES: u64 = 4 << 20;
/// Free space of which so much may be taken.
const PLENTY_BYTES: u64 = 16 * SPARE_BYTES;

/// Gives the spare space up when nothing else is left.
pub(super) fn give_if_full(storage: &Disk, root: &Path) {
    let is_full = storage.space(root).is_ok_and(|(free_bytes, _)| free_bytes < SPARE_BYTES);
    if is_full && storage.remove(&root.join(SPARE)).is_ok() {
        tracing::warn!(path = %root.display(), "the disk is full: what was kept for that is free now");
    }
}

impl Store {
    /// Called before what frees space: gives the spare space up when nothing else is left.
    pub fn give_spare(&self) {
        give_if_full(&self.storage, &self.root);
    }

    /// Takes spare space where there is plenty. That it can't be had is no failure.
    pub fn keep_spare(&self) {
        if self.space().is_ok_and(|(free_bytes, _)| free_bytes > PLENTY_BYTES) {
            self.storage.allocate(&self.root.join(SPARE), SPARE_BYTES);
        }
    }
}
