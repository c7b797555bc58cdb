//! The restart pages of `$LogFile`: whether the volume was at rest when it was left.

use super::{FsError, fixups, record::Bytes};

/// The log can't say that anything is missing from the structures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogState {
    /// Closed by a driver that writes it. The number only grows while the volume stays the same one.
    Closed {
        /// Log sequence number of the end.
        lsn: u64,
    },
    /// Emptied by a driver that doesn't write it, as ntfs-3g.
    Empty,
}

const PAGE_BYTES: usize = 4096;
const NO_CLIENT: u16 = 0xFFFF;
const IS_CLEAN: u16 = 2;

/// Reads the log's restart pages.
pub(super) fn state(
    size_bytes: u64,
    read: impl Fn(u64, &mut [u8]) -> Result<(), FsError>,
) -> Result<LogState, FsError> {
    if size_bytes < 4 * PAGE_BYTES as u64 {
        return Err(FsError::damaged("$LogFile is too short"));
    }
    let mut pages = vec![0; 2 * PAGE_BYTES];
    read(0, &mut pages)?;
    if pages.iter().all(|byte| *byte == 0xFF) {
        return Ok(LogState::Empty);
    }
    let newest = pages.chunks_mut(PAGE_BYTES).filter_map(restart).max_by_key(|restart| restart.lsn);
    let newest = newest.ok_or_else(|| FsError::not_clean("$LogFile has no restart page"))?;
    match newest.is_clean {
        true => Ok(LogState::Closed { lsn: newest.lsn }),
        false => Err(FsError::not_clean("it is in use, or was not unmounted")),
    }
}

struct Restart {
    lsn: u64,
    is_clean: bool,
}

/// A restart page that is whole.
fn restart(page: &mut [u8]) -> Option<Restart> {
    let head = Bytes(page);
    // Pages of other sizes are of machines that nobody has.
    if !page.starts_with(b"RSTR") || head.u32(16).ok()? as usize != PAGE_BYTES {
        return None;
    }
    fixups::put_back(page).ok()?;
    let head = Bytes(page);
    let area = head.0.get(usize::from(head.u16(24).ok()?)..).map(Bytes)?;
    let is_clean = area.u16(12).ok()? == NO_CLIENT || area.u16(14).ok()? & IS_CLEAN != 0;
    Some(Restart { lsn: area.u64(0).ok()?, is_clean })
}
