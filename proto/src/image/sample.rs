//! Chains for tests, made the way a session makes them: data into slots first, the structures around it afterwards.
//! Also a module of `tests/outside_readers.rs`, which imports what `super` names here.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::{
    Format, Geometry, Identity, Image, Kind, Layout, PAYLOAD_BYTES, Payload, UNIT_BYTES,
    storage::{Access, Disk, File},
};

const UNITS: u64 = PAYLOAD_BYTES / UNIT_BYTES;

/// A chain in a folder and, beside it, what it must read as.
pub struct Sample {
    pub folder: PathBuf,
    pub geometry: Geometry,
    pub format: Format,
    /// Unit -> content, for all units that were ever written.
    pub model: BTreeMap<u64, Vec<u8>>,
    /// Files, oldest first.
    pub files: Vec<PathBuf>,
}

impl Sample {
    pub fn new(folder: &Path, geometry: Geometry) -> Self {
        Self::of(Format::Vhdx, folder, geometry)
    }

    pub fn of(format: Format, folder: &Path, geometry: Geometry) -> Self {
        Self { folder: folder.into(), geometry, format, model: BTreeMap::new(), files: Vec::new() }
    }

    /// Adds a base, then children, with `units` of new content (as [`unit`] makes it; seed 0 is zeros).
    pub fn add(&mut self, units: &BTreeMap<u64, u64>) {
        let number = self.files.len();
        let path = self.folder.join(format!("disk-{number:04}.{}", self.format.extension()));
        let identity =
            Identity { data_write: Uuid::new_v4(), virtual_disk: Uuid::from_u128(0x1234) };
        let parent = self.files.last().map(|path| {
            let image = Disk::default().open(path, Access::Read).unwrap();
            let image = Image::open(image).unwrap();
            image.as_parent(&path.file_name().unwrap().to_string_lossy())
        });
        let kind = if parent.is_some() { Kind::Differencing } else { Kind::Dynamic };
        let layout = self.format.layout(self.geometry, kind).unwrap();
        let file = Disk::default().open(&path, Access::CreateNew).unwrap();
        let blocks = fill_slots(&file, &layout, units, &mut self.model);
        let listed = blocks.values().copied().map(Ok::<_, Infallible>);
        let slots = blocks.len() as u32;
        let length =
            layout.write_structures(&file, &identity, parent.as_ref(), slots, listed).unwrap();
        assert_eq!(length, file.metadata().unwrap().length_bytes);
        self.files.push(path);
    }

    /// All images, newest first.
    #[allow(dead_code)] // Outside readers don't need it.
    pub fn open(&self) -> Vec<Image> {
        self.files
            .iter()
            .rev()
            .map(|path| {
                Image::open(Disk::default().open_data(path, Access::Read).unwrap()).unwrap()
            })
            .collect()
    }

    #[allow(dead_code)] // Only outside readers need it.
    /// The disk as a raw file of its virtual size.
    pub fn write_raw(&self, path: &Path) {
        let file = Disk::default().open(path, Access::CreateNew).unwrap();
        file.set_len(self.format.layout(self.geometry, Kind::Dynamic).unwrap().virtual_bytes())
            .unwrap();
        for (unit, content) in &self.model {
            file.write_all_at(content, unit * UNIT_BYTES).unwrap();
        }
    }
}

/// Content of unit `number` made from `seed`, different in each of its sectors.
pub fn unit(number: u64, seed: u64) -> Vec<u8> {
    if seed == 0 {
        return vec![0; UNIT_BYTES as usize];
    }
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number;
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..UNIT_BYTES).map(|_| next()).collect()
}

/// Writes units to slots; the later a payload block comes on the disk, the earlier its slot, and zeros are not written at all.
fn fill_slots(
    file: &File,
    layout: &Layout,
    units: &BTreeMap<u64, u64>,
    model: &mut BTreeMap<u64, Vec<u8>>,
) -> BTreeMap<u64, Payload> {
    let mut blocks = BTreeMap::new();
    for (&number, &seed) in units.iter().rev() {
        let (index, within) = (number / UNITS, number % UNITS);
        let slot = blocks.len() as u32;
        let block = blocks.entry(index).or_insert(Payload { index, slot, present: [0; 8] });
        block.present[within as usize / 64] |= 1 << (within % 64);
        let mut content = unit(number, seed);
        // The source is read up to the disk's end, the padding behind it stays zero.
        let disk_bytes = layout.geometry().disk_bytes;
        let length = disk_bytes.saturating_sub(number * UNIT_BYTES).min(UNIT_BYTES) as usize;
        content[length..].fill(0);
        if seed != 0 {
            let at = layout.slot_offset(block.slot) + within * UNIT_BYTES;
            file.write_all_at(&content[..length], at).unwrap();
        }
        model.insert(number, content);
    }
    blocks
}
