//! `base:allocation`: where the disk is known to be zeros.

use std::{io, sync::Arc};

use super::Tells;
use crate::{
    nbd::wire::{ALLOCATION, STATE_HOLE, STATE_ZERO},
    source::medium::Medium,
};

/// Name of the context.
pub const NAME: &str = ALLOCATION;

/// Holes of a disk.
#[derive(Debug)]
pub struct Allocation(pub Arc<dyn Medium>);

impl Tells for Allocation {
    fn tell(&self, offset: u64) -> io::Result<(u64, u32)> {
        let stretch = self.0.stretch(offset);
        Ok((stretch.end, if stretch.hole { STATE_HOLE | STATE_ZERO } else { 0 }))
    }
}
