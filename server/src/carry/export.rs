//! A run out of the store into a folder: each disk as one image, however long its chain is here.

use std::path::Path;

use janus_proto::{
    carried::{Claim, DiskEntry, DiskWriter, Manifest},
    hash::zero_segment_of,
    ids::{SEGMENT_BLOCKS, SEGMENT_BYTES, segment_count},
    image::Geometry,
};

use super::{CarryError, Meter, whole};
use crate::{
    chain::{Run, opened::OpenedSnapshot},
    runs::Runs,
};

/// Writes a run with all its disks to `folder`. Each block is compared with its hash on the way.
///
/// # Errors
/// When a disk can't be read as a whole, the folder can't be written, or it was stopped: then the folder holds no run.
pub fn export(
    runs: &Runs,
    run: &Run,
    folder: &Path,
    hear: &dyn Fn(u64, u64) -> bool,
) -> Result<Manifest, CarryError> {
    // All of them first: while they are open no merge takes anything away.
    let opened = run.snapshots.iter().map(|snapshot| whole::open(runs, snapshot.id));
    let opened: Vec<OpenedSnapshot> = opened.collect::<Result<_, _>>()?;
    let disks = run.snapshots.iter().map(|snapshot| snapshot.disk.clone());
    let claim = Claim::take(runs.store().storage(), folder, disks)?;
    let total = run.snapshots.iter().map(|snapshot| snapshot.size_bytes).sum();
    let mut meter = Meter::new(total, hear);
    let written = opened.iter().map(|opened| export_disk(&claim, opened, &mut meter));
    let entries = match written.collect::<Result<Vec<DiskEntry>, CarryError>>() {
        Ok(entries) => entries,
        Err(error) => {
            claim.give_up();
            return Err(error);
        }
    };
    // Of a run that was imported itself the carried one's name goes on: it is the same content.
    let id = run.origin.as_ref().and_then(|origin| origin.run).unwrap_or(run.backup);
    let (machine, seal) = (run.machine.clone(), &run.client_seal);
    let manifest = Manifest::new(id, machine, run.committed_ms, seal, entries);
    claim.finish(&manifest)?;
    Ok(manifest)
}

fn export_disk(
    claim: &Claim,
    opened: &OpenedSnapshot,
    meter: &mut Meter<'_>,
) -> Result<DiskEntry, CarryError> {
    let snapshot = opened.held.snapshot();
    let size = snapshot.size_bytes;
    let geometry =
        Geometry { disk_bytes: size, logical_sector_bytes: snapshot.logical_sector_bytes };
    let mut writer = DiskWriter::create(claim, &snapshot.disk, geometry)?;
    let mut ahead = opened.ahead();
    let mut buffer = vec![0; SEGMENT_BYTES.min(size) as usize];
    for segment in 0..segment_count(size) {
        let start = segment * SEGMENT_BYTES;
        let bytes = &mut buffer[..(size - start).min(SEGMENT_BYTES) as usize];
        if opened.tables.digest(segment) != zero_segment_of(size, segment) {
            let failed = |source| CarryError::Table { disk: snapshot.disk.clone(), source };
            let hashes = opened.tables.segment(segment).map_err(failed)?;
            ahead.segment(segment);
            ahead.segment(segment + 1);
            whole::read(opened, &ahead, segment * SEGMENT_BLOCKS, &hashes, bytes)?;
            writer.segment(segment, &hashes, bytes)?;
        }
        meter.add(bytes.len() as u64)?;
    }
    Ok(writer.finish(snapshot.consistency, snapshot.skipped_bytes)?)
}
