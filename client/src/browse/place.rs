//! What a user means by `WHAT:/VOLUME/PATH`.

use std::sync::Arc;

use super::{BrowseError, shown};
use crate::{
    source::{Bytes, medium::Medium},
    volume::{self, Layout, Volume, VolumeError},
};

/// Why a place can't be found.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// It isn't written as one.
    #[error(
        "{text}: write WHAT:/VOLUME/PATH, such as sda:/2/etc/fstab; `janus-client ls {what}` lists the volumes"
    )]
    Written {
        /// As it was written.
        text: String,
        /// The part before the colon.
        what: String,
    },
    /// No volume has that number or label, or several have that label.
    #[error("there is {problem} volume {name}; the disk has {known}")]
    Volume {
        /// No, or more than one.
        problem: &'static str,
        /// As it was written.
        name: String,
        /// The ones there are.
        known: String,
    },
    /// Its volumes can't be told.
    #[error("the disk {0}")]
    Layout(#[from] VolumeError),
    /// What is in the volume can't be had.
    #[error(transparent)]
    Browse(#[from] BrowseError),
}

/// A disk, or something in a volume of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inside {
    /// Disk or snapshot, as `restore` has it.
    pub what: String,
    /// Number or label of the volume; `None`: all of them.
    pub volume: Option<String>,
    /// Path on the volume, with a slash before it and none after it.
    pub path: Vec<u8>,
}

impl Inside {
    /// Reads `WHAT`, `WHAT:`, `WHAT:/`, `WHAT:/VOLUME` or `WHAT:/VOLUME/PATH`.
    ///
    /// # Errors
    /// When it is none of these, or the path leads upwards.
    pub fn parse(text: &[u8]) -> Result<Self, PlaceError> {
        let colon = text.iter().position(|byte| *byte == b':');
        let (what, place) = colon.map_or((text, &b""[..]), |at| (&text[..at], &text[at + 1..]));
        let what = String::from_utf8_lossy(what).into_owned();
        let wrong = || PlaceError::Written { text: shown(text), what: what.clone() };
        if what.is_empty() || !(place.is_empty() || place.starts_with(b"/")) {
            return Err(wrong());
        }
        let mut parts = place.split(|byte| *byte == b'/').filter(|part| !part.is_empty());
        let volume = parts.next().map(|name| String::from_utf8_lossy(name).into_owned());
        let mut path = Vec::new();
        for part in parts {
            if part == b"." || part == b".." {
                return Err(wrong());
            }
            path.push(b'/');
            path.extend_from_slice(part);
        }
        if path.is_empty() {
            path.push(b'/');
        }
        Ok(Self { what, volume, path })
    }

    /// The volume that it names.
    ///
    /// # Errors
    /// When none or several have that name.
    pub fn find<'a>(&self, layout: &'a Layout) -> Result<&'a Volume, PlaceError> {
        let name = self.volume.clone().unwrap_or_default();
        let of_number = layout.volumes.iter().find(|one| one.number.to_string() == name);
        if let Some(volume) = of_number {
            return Ok(volume);
        }
        let is_called =
            |one: &&Volume| !name.is_empty() && (one.fs_label == name || one.label == name);
        let mut called = layout.volumes.iter().filter(is_called);
        match (called.next(), called.next()) {
            (Some(volume), None) => Ok(volume),
            (found, _) => {
                let problem = if found.is_some() { "more than one" } else { "no" };
                Err(PlaceError::Volume { problem, name, known: known(layout) })
            }
        }
    }
}

fn known(layout: &Layout) -> String {
    let names: Vec<_> = layout.volumes.iter().map(|one| one.number.to_string()).collect();
    match names.is_empty() {
        true => "no volumes that are known here".into(),
        false => names.join(", "),
    }
}

/// The last part of a path of NTFS may name a stream: `file:stream`.
pub fn split_stream(path: &[u8]) -> (&[u8], &str) {
    let name = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    let colon = path[name..].iter().position(|byte| *byte == b':').map(|at| name + at);
    let split =
        colon.and_then(|at| Some((&path[..at], std::str::from_utf8(&path[at + 1..]).ok()?)));
    split.unwrap_or((path, ""))
}

/// What is on a disk.
///
/// # Errors
/// When it can't be read or its table is damaged.
pub fn layout(medium: &Arc<dyn Medium>) -> Result<Layout, PlaceError> {
    Ok(volume::layout(&Bytes(&**medium), medium.sector_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_disk_a_volume_and_a_path() {
        let parse = |text: &str| {
            let Inside { what, volume, path } = Inside::parse(text.as_bytes()).unwrap();
            (what, volume.unwrap_or_default(), String::from_utf8(path).unwrap())
        };
        let of = |what: &str, volume: &str, path: &str| {
            (what.to_owned(), volume.to_owned(), path.to_owned())
        };
        assert_eq!(parse("sda"), of("sda", "", "/"));
        assert_eq!(parse("sda:"), of("sda", "", "/"));
        assert_eq!(parse("alice/laptop/sda:/"), of("alice/laptop/sda", "", "/"));
        assert_eq!(parse("sda:/2"), of("sda", "2", "/"));
        assert_eq!(parse("sda:/2/"), of("sda", "2", "/"));
        assert_eq!(parse("sda:/2//etc/fstab/"), of("sda", "2", "/etc/fstab"));
        assert_eq!(parse("sda:/data/a:b"), of("sda", "data", "/a:b"));
        for text in ["", ":/2", "sda:2/etc", "sda:/2/../x", "sda:/2/./x"] {
            assert!(Inside::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_stream_stands_after_the_last_name() {
        assert_eq!(split_stream(b"/a/b:c"), (&b"/a/b"[..], "c"));
        assert_eq!(split_stream(b"/a:x/b"), (&b"/a:x/b"[..], ""));
        assert_eq!(split_stream(b"/b"), (&b"/b"[..], ""));
    }
}
