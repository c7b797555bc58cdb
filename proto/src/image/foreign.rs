//! Chains that other programs made, opened by the name of their newest image.
//!
//! Parents are looked for in the folder of their child, under the names that it gives them; whatever folders these names
//! have are left out, so that no image leads out of its folder. The links are checked by id, as in our own chains. Nothing is
//! ever written.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{Image, ImageError, Layers};
use crate::storage::Disk;

/// Longest chain that is followed. Windows follows fewer.
const MAX_IMAGES: usize = 1024;

/// Why a chain could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ForeignError {
    /// The file system refused.
    #[error("cannot open {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// One of the images.
    #[error("image {}: {source}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
    },
    /// A parent is not there.
    #[error("image {}: its parent {} is not in the same folder: copy it there", path.display(), names.join(" or "))]
    NoParent {
        /// The child.
        path: PathBuf,
        /// What the parent could be called.
        names: Vec<String>,
    },
    /// It doesn't end.
    #[error("image {}: its chain has more than {MAX_IMAGES} images, or goes in a circle", path.display())]
    TooLong {
        /// The newest image.
        path: PathBuf,
    },
}

/// A chain and its files, both newest first.
#[derive(Debug)]
pub struct ForeignChain {
    /// The chain, to be read as one disk.
    pub layers: Layers,
    /// Where its images are.
    pub paths: Vec<PathBuf>,
}

/// Opens the image at `path` and all that it is built on.
///
/// # Errors
/// When an image is missing or damaged, or is not the one that its child was made on.
pub fn open_chain(storage: &Disk, path: &Path) -> Result<ForeignChain, ForeignError> {
    let (mut images, mut paths) = (Vec::<Arc<Image>>::new(), vec![path.to_owned()]);
    while images.len() < paths.len() {
        if paths.len() > MAX_IMAGES {
            return Err(ForeignError::TooLong { path: path.to_owned() });
        }
        let path = &paths[images.len()];
        let file = storage.open_named(path);
        let file = file.map_err(|source| ForeignError::Io { path: path.clone(), source })?;
        let failed = |source| ForeignError::Image { path: path.clone(), source };
        let image = Arc::new(Image::open_foreign(file).map_err(failed)?);
        if let Some(child) = images.last() {
            super::layers::check_link(child, &image).map_err(failed)?;
        }
        let parent = match image.parent() {
            Some(_) => Some(find_parent(storage, path, image.parent_names())?),
            None => None,
        };
        images.push(image);
        paths.extend(parent);
    }
    let failed = |source| ForeignError::Image { path: path.to_owned(), source };
    Ok(ForeignChain { layers: Layers::new(images).map_err(failed)?, paths })
}

/// The file beside `child` that has one of these names; the case of letters doesn't count where nothing fits exactly.
fn find_parent(storage: &Disk, child: &Path, names: &[String]) -> Result<PathBuf, ForeignError> {
    let folder = match child.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let failed = |source| ForeignError::Io { path: folder.to_owned(), source };
    let there = storage.list(folder).map_err(failed)?;
    let is_named = |path: &&PathBuf, wanted: &str, same: fn(&str, &str) -> bool| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| same(name, wanted))
    };
    let exactly: fn(&str, &str) -> bool = |a, b| a == b;
    let roughly: fn(&str, &str) -> bool = |a, b| a.to_lowercase() == b.to_lowercase();
    let found = [exactly, roughly].into_iter().find_map(|same| {
        names.iter().find_map(|wanted| there.iter().find(|path| is_named(path, wanted, same)))
    });
    found
        .cloned()
        .ok_or_else(|| ForeignError::NoParent { path: child.to_owned(), names: names.to_owned() })
}
