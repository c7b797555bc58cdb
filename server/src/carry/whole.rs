//! Snapshots that are to leave the store: as a whole, each block compared with its hash, or not at all.

use janus_proto::{
    hash::hash_blocks,
    ids::{BLOCK_BYTES, BlockHash, SnapshotId},
};

use super::CarryError;
use crate::{
    chain::opened::{Ahead, OpenedSnapshot, Salvage},
    runs::{RunError, Runs},
};

/// Opens a snapshot. While it is open no merge takes anything of it away.
///
/// # Errors
/// When it is gone, can't be opened, or builds on a stub that isn't full.
pub(crate) fn open(runs: &Runs, id: SnapshotId) -> Result<OpenedSnapshot, CarryError> {
    let unknown = || RunError::Unknown { id: id.to_string() };
    let held = runs.snapshot(id).ok_or_else(unknown)?;
    let (machine, disk) = (&held.run.machine, &held.snapshot().disk);
    if runs.machine(machine).is_some_and(|machine| machine.missing_blocks(id) > 0) {
        return Err(CarryError::Incomplete { machine: machine.clone(), disk: disk.clone() });
    }
    let opened = runs.open_for_reading(&held);
    opened.map_err(|source| CarryError::Open { disk: disk.clone(), source })
}

/// Fills `buffer` with blocks from `first` on, by any way there is. Their hashes are the first of `hashes`.
///
/// # Errors
/// When one of them is lost.
pub(crate) fn read(
    opened: &OpenedSnapshot,
    ahead: &Ahead<'_>,
    first: u64,
    hashes: &[BlockHash],
    buffer: &mut [u8],
) -> Result<(), CarryError> {
    if ahead.read_at(first * BLOCK_BYTES, buffer).is_ok() {
        let mut found = Vec::with_capacity(buffer.len().div_ceil(BLOCK_BYTES as usize));
        hash_blocks(buffer, &mut found);
        if hashes.starts_with(&found) {
            return Ok(());
        }
    }
    let mut salvage = Salvage::new(opened);
    let pieces = buffer.chunks_mut(BLOCK_BYTES as usize);
    for ((block, hash), piece) in (first..).zip(hashes).zip(pieces) {
        if !salvage.read(block, *hash, piece) {
            let (machine, disk) = (&opened.held.run.machine, &opened.held.snapshot().disk);
            return Err(CarryError::Lost { machine: machine.clone(), disk: disk.clone(), block });
        }
    }
    Ok(())
}
