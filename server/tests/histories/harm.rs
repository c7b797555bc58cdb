//! What can happen to a stored file.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
};

/// Which file of a link.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    Image,
    Table,
    Manifest,
}

/// What happens to it. Numbers choose among what is there.
#[derive(Debug, Clone, Copy)]
pub enum Harm {
    /// A bit of a page that is not all zeros.
    Flip {
        at: u64,
        bit: u8,
    },
    Delete,
    Cut(u64),
}

impl Harm {
    /// Does it; says where a bit was flipped.
    pub fn happen(self, path: &Path) -> Option<u64> {
        match self {
            Self::Flip { at, bit } => return flip(path, at, bit),
            Self::Delete => fs::remove_file(path).unwrap(),
            Self::Cut(at) => {
                let file = OpenOptions::new().write(true).open(path).unwrap();
                let length = file.metadata().unwrap().len();
                file.set_len(at % length.max(1)).unwrap();
            }
        }
        None
    }
}

fn flip(path: &Path, at: u64, bit: u8) -> Option<u64> {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let pages = used_pages(&file);
    let page = pages.get((at % pages.len().max(1) as u64) as usize)?;
    let length = file.metadata().unwrap().len();
    let place = (page + at / 4096 % 4096).min(length - 1);
    let mut byte = [0];
    file.read_exact_at(&mut byte, place).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << bit], place).unwrap();
    Some(place)
}

/// Offsets of the pages of a file that hold something.
fn used_pages(file: &File) -> Vec<u64> {
    let length = file.metadata().unwrap().len();
    let mut page = vec![0; 4096];
    let mut is_used = |start: u64| {
        let part = &mut page[..4096.min(length - start) as usize];
        file.read_exact_at(part, start).unwrap();
        part.iter().any(|byte| *byte != 0)
    };
    (0..length).step_by(4096).filter(|start| is_used(*start)).collect()
}
