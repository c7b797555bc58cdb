//! The master key of a machine, and its file.
//!
//! The file holds the key as its recovery key, beside a line for people. It is made in one step and never replaced.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    str::FromStr,
};

use zeroize::{Zeroize, Zeroizing};

use super::{SealError, disk::Derived, recovery::RecoveryKey};
use crate::files::{new_private, sync_folder};

/// Bytes of a master key.
pub(super) const BYTES: usize = 32;
/// A longer file holds something else.
const MAX_FILE_BYTES: u64 = 4096;
const TEXT: &str = "# Key of this machine's sealed backups (janus-client). Who has it can read them, and nobody can without it.\n# Not the only copy: keep its recovery key elsewhere.\n";

/// Names a key, and says nothing of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub(super) [u8; Self::LEN]);

impl KeyId {
    /// Bytes of an id.
    pub const LEN: usize = 8;
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut id = [0; Self::LEN];
        hex::decode_to_slice(text, &mut id).map(|()| Self(id))
    }
}

/// Bytes of a key, at one place of memory whoever owns them: what is moved otherwise leaves copies behind.
pub(super) type Secret = Box<Zeroizing<[u8; BYTES]>>;

/// A machine's key, from which all others come. Wiped from memory when it goes.
pub struct MasterKey {
    bytes: Secret,
    id: KeyId,
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterKey({})", self.id)
    }
}

impl MasterKey {
    /// A new one.
    ///
    /// # Errors
    /// When the system has no random bytes.
    pub fn generate() -> Result<Self, SealError> {
        let mut bytes = Secret::default();
        getrandom::fill(&mut bytes[..]).map_err(|error| SealError::Random(error.to_string()))?;
        Ok(Self::new(bytes))
    }

    pub(super) fn new(bytes: Secret) -> Self {
        let mut key = Self { bytes, id: KeyId([0; KeyId::LEN]) };
        let derived = key.derive("janus-backup 2026-11 sealed machines: key id", &[]);
        key.id = KeyId(*derived.first_chunk().unwrap_or(&[0; KeyId::LEN]));
        key
    }

    /// One of these bytes.
    #[cfg(test)]
    pub(crate) fn of(bytes: [u8; BYTES]) -> Self {
        Self::new(Box::new(Zeroizing::new(bytes)))
    }

    /// Its name.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// The same for people.
    pub fn recovery(&self) -> RecoveryKey {
        RecoveryKey::of(&self.bytes)
    }

    /// A key for one use: `context` says which, `names` for what.
    pub(super) fn derive(&self, context: &str, names: &[&[u8]]) -> Derived {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher.update(&self.bytes[..]);
        for name in names {
            // With its length, so that no two lists of names read the same.
            hasher.update(&(name.len() as u64).to_le_bytes());
            hasher.update(name);
        }
        let mut derived = Zeroizing::new([0; 32]);
        let mut reader = hasher.finalize_xof();
        reader.fill(&mut derived[..]);
        reader.zeroize();
        hasher.zeroize();
        derived
    }

    /// Reads a key file. Blocks.
    ///
    /// # Errors
    /// When it can't be read, others may read it, or it holds no key.
    pub fn load(path: &Path) -> Result<Self, SealError> {
        let failed = |source| SealError::Io { path: path.into(), action: "read", source };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(SealError::Loose { path: path.into(), mode });
        }
        // Never longer than this, so that it doesn't move in memory and leave copies.
        let mut text = Zeroizing::new(String::with_capacity(MAX_FILE_BYTES as usize));
        file.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(failed)?;
        let recovery = RecoveryKey::parse(&text);
        let key = recovery.map(|recovery| recovery.master());
        key.map_err(|source| SealError::Damaged { path: path.into(), source })
    }

    /// As [`MasterKey::load`]; `None`: there is no file. Blocks.
    ///
    /// # Errors
    /// When there is one that can't be used.
    pub fn find(path: &Path) -> Result<Option<Self>, SealError> {
        match Self::load(path) {
            Err(SealError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            found => found.map(Some),
        }
    }

    /// Writes it to a new file, which only its owner may read. Durable when it returns. Blocks.
    ///
    /// # Errors
    /// When there is a file already, or it can't be written.
    pub fn store_new(&self, path: &Path) -> Result<(), SealError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => SealError::Exists(path.into()),
            _ => SealError::Io { path: path.into(), action: "written", source },
        };
        if fs::symlink_metadata(path).is_ok() {
            return Err(SealError::Exists(path.into()));
        }
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}.new", std::process::id()));
        let new = PathBuf::from(new);
        let recovery = self.recovery().shown();
        let pieces = [TEXT.as_bytes(), recovery.as_bytes(), b"\n"];
        let written = new_private(&new, &pieces).and_then(|()| {
            // A link never replaces what somebody else has put there meanwhile.
            let linked = fs::hard_link(&new, path);
            linked.and_then(|()| sync_folder(path))
        });
        let _ = fs::remove_file(&new);
        written.map_err(failed)
    }
}

/// Makes a machine's key and writes it to a new file; its recovery key is to be shown once, and kept elsewhere. Blocks.
///
/// # Errors
/// When there is a file already, or it can't be written.
pub fn init(path: &Path) -> Result<MasterKey, SealError> {
    let key = MasterKey::generate()?;
    key.store_new(path)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_made_once_for_its_owner_alone_and_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seal.key");
        let missing = MasterKey::load(&path).unwrap_err();
        assert!(matches!(missing, SealError::Io { .. }), "{missing}");
        let key = init(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(MasterKey::load(&path).unwrap().id(), key.id());
        let before = fs::read(&path).unwrap();
        assert!(matches!(init(&path), Err(SealError::Exists(_))));
        assert_eq!(fs::read(&path).unwrap(), before);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing else is left");
        assert_ne!(init(&folder.path().join("other")).unwrap().id(), key.id());
    }

    #[test]
    fn a_file_that_others_read_or_that_holds_no_key_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seal.key");
        init(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let loose = MasterKey::load(&path).unwrap_err();
        assert!(matches!(loose, SealError::Loose { mode: 0o640, .. }), "{loose}");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        for wrong in ["", "# nothing\n", &text[..text.len() - 3]] {
            fs::write(&path, wrong).unwrap();
            assert!(matches!(MasterKey::load(&path), Err(SealError::Damaged { .. })), "{wrong}");
        }
    }

    #[test]
    fn names_are_told_apart_wherever_they_end() {
        let key = MasterKey::of([3; 32]);
        let derived = |names: &[&[u8]]| *key.derive("test", names);
        assert_ne!(derived(&[b"ab", b"c"]), derived(&[b"a", b"bc"]));
        assert_ne!(derived(&[b"a"]), *key.derive("other", &[b"a"]));
        assert_eq!(derived(&[b"a"]), derived(&[b"a"]));
        let id = key.id();
        assert_eq!(id.to_string().parse::<KeyId>().unwrap(), id);
    }
}
