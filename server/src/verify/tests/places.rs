//! Places of a store that can be damaged.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::scene::{BLOCK, Noise, Scene};

/// What is done to a file; a block that is punched is gone.
#[derive(Debug, Clone)]
enum Harm {
    Flip { at: u64, bit: u8 },
    Punch { at: u64 },
    Delete,
    Cut { length: u64 },
}

/// One thing that can happen to a store.
#[derive(Debug, Clone)]
pub struct Place {
    /// What kind of place it is.
    pub kind: &'static str,
    /// It can only touch a single block of a disk.
    pub is_one_block: bool,
    /// Below the machine's folder.
    file: PathBuf,
    harm: Harm,
}

impl Place {
    /// Damages the store whose machine has this folder.
    pub fn damage(&self, root: &Path) {
        let path = root.join(Scene::MACHINE).join(&self.file);
        match self.harm {
            Harm::Delete => fs::remove_file(path).unwrap(),
            Harm::Cut { length } => {
                OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
            }
            Harm::Flip { at, bit } => {
                let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
            }
            Harm::Punch { at } => {
                let file = OpenOptions::new().write(true).open(path).unwrap();
                file.write_all_at(&[0; BLOCK], at).unwrap();
            }
        }
    }
}

/// `count` places of each kind, and every file deleted and cut.
pub fn places(scene: &Scene, count: usize) -> Vec<Place> {
    let mut noise = Noise::new(11);
    let mut places = Vec::new();
    let oldest_first: Vec<_> = scene.snapshots().into_iter().rev().collect();
    for (number, held) in oldest_first.iter().enumerate() {
        let (image, table) =
            (PathBuf::from(&held.snapshot().image), PathBuf::from(&held.snapshot().table));
        let data = if number == 0 { "data of the base" } else { "data of a delta" };
        let mut add = |kind, file: &Path, places_in: Vec<u64>| {
            for _ in 0..count {
                let at = places_in[noise.below(places_in.len() as u64) as usize];
                let (bit, file) = (noise.below(8) as u8, file.to_owned());
                let is_one_block = kind == data;
                places.push(Place { kind, is_one_block, file, harm: Harm::Flip { at, bit } });
            }
        };
        let used = used_bytes(&scene.folder().join(&image));
        let within = |from: u64, to: u64| {
            used.iter().copied().filter(|at| (from..to).contains(at)).collect()
        };
        add("headers and regions of an image", &image, within(0, 1 << 20));
        add("metadata of an image", &image, within(2 << 20, 3 << 20));
        add("allocation table of an image", &image, within(3 << 20, 4 << 20));
        let (data_bytes, bitmaps) = scene.parts(held, &used);
        add(data, &image, data_bytes.clone());
        if number > 0 {
            add("sector bitmap of an image", &image, bitmaps);
        }
        let table_bytes = used_bytes(&scene.folder().join(&table));
        let end = fs::metadata(scene.folder().join(&table)).unwrap().len();
        let index = end - scene.segments_in(&table) * 56;
        let part = |from: u64, to: u64| {
            table_bytes.iter().copied().filter(|at| (from..to).contains(at)).collect()
        };
        add("header of a table", &table, part(0, 160));
        add("page of a table", &table, part(160, index));
        add("index of a table", &table, part(index, end));
        let manifest = PathBuf::from(format!(".runs/{:08}.json", held.run.sequence));
        add("manifest", &manifest, used_bytes(&scene.folder().join(&manifest)));
        for _ in 0..count {
            let at = data_bytes[noise.below(data_bytes.len() as u64) as usize];
            let harm = Harm::Punch { at: at / BLOCK as u64 * BLOCK as u64 };
            let kind = if number == 0 { "block of the base" } else { "block of a delta" };
            places.push(Place { kind, is_one_block: true, file: image.clone(), harm });
        }
        for file in [&image, &table, &manifest] {
            let length = fs::metadata(scene.folder().join(file)).unwrap().len();
            let (is_one_block, file) = (false, file.clone());
            let kind = if file == image {
                "whole image"
            } else if file == table {
                "whole table"
            } else {
                "whole manifest"
            };
            places.push(Place { kind, is_one_block, file: file.clone(), harm: Harm::Delete });
            for length in [0, length / 2, length - 1] {
                places.push(Place {
                    kind,
                    is_one_block,
                    file: file.clone(),
                    harm: Harm::Cut { length },
                });
            }
        }
    }
    places
}

/// Offsets of the bytes of a file that are not zero, and of some that are.
fn used_bytes(path: &Path) -> Vec<u64> {
    let file = File::open(path).unwrap();
    let end = file.metadata().unwrap().len();
    let mut used = Vec::new();
    let mut page = vec![0; 4096];
    for start in (0..end).step_by(4096) {
        let piece = &mut page[..4096.min(end - start) as usize];
        file.read_exact_at(piece, start).unwrap();
        if piece.iter().any(|byte| *byte != 0) {
            used.extend(
                (start..).zip(piece.iter()).filter(|(_, byte)| **byte != 0).map(|(at, _)| at),
            );
            used.push(start + piece.len() as u64 - 1);
        }
    }
    used
}
