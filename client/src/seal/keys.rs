//! Which snapshots are opened, by which key, and which are refused: asked before anything of one is written or shown.

use std::{path::PathBuf, sync::Arc};

use janus_proto::{
    ids::{BlockHash, MachineKey},
    pb::Snapshot,
};

use super::{
    DiskSeal, KeyId, MasterKey, SealError, Sealer,
    run::{RunSeal, SealedDisk, Unreadable},
};
use crate::config::{Encryption, Settings};

/// What the user allows.
#[derive(Debug, Clone, Default)]
pub struct Wishes {
    /// Snapshots that aren't sealed, also on a machine that seals.
    pub allow_unsealed: bool,
    /// Snapshots that this machine sealed, under whatever name they are kept now.
    pub sealed_as: Option<MachineKey>,
}

/// The key that is here, if one is, and what is done without.
#[derive(Debug, Default)]
pub struct Keys {
    path: PathBuf,
    /// None: why not.
    key: Option<Arc<MasterKey>>,
    why: String,
    is_sealing: bool,
    wishes: Wishes,
}

impl Keys {
    /// Looks for the key of the settings. Blocks. That there is none is said when one is needed.
    pub fn load(settings: &Settings, wishes: Wishes) -> Self {
        let path = settings.seal_key_path();
        let (key, why) = match MasterKey::load(&path) {
            Ok(key) => (Some(Arc::new(key)), String::new()),
            Err(error) => (None, error.to_string()),
        };
        Self { path, key, why, is_sealing: settings.encryption == Encryption::Client, wishes }
    }

    /// This key and no other.
    pub fn of(key: MasterKey, wishes: Wishes) -> Self {
        Self { key: Some(Arc::new(key)), wishes, ..Self::default() }
    }

    /// What opens a snapshot's blocks; `None`: it isn't sealed, and needn't be.
    ///
    /// # Errors
    /// When it is sealed and can't be opened here, isn't what was sealed, or should be sealed and isn't.
    pub fn open(&self, snapshot: &Snapshot) -> Result<Option<Arc<DiskSeal>>, SealError> {
        let id = || snapshot.snapshot_id.clone();
        if snapshot.client_seal.is_empty() {
            return match self.is_sealing && !self.wishes.allow_unsealed {
                true => {
                    Err(SealError::Unsealed { snapshot: id(), server: snapshot.server_id.clone() })
                }
                false => Ok(None),
            };
        }
        let seal =
            RunSeal::parse(&snapshot.client_seal).map_err(|unreadable| match unreadable {
                Unreadable::Newer(version) => SealError::Newer { snapshot: id(), version },
                Unreadable::Malformed => changed(snapshot, "its seal can't be read"),
            })?;
        let key = self.key_for(snapshot, seal.key)?;
        let disk = snapshot.disk_id.parse();
        let disk = disk.map_err(|_| changed(snapshot, "its name is none"))?;
        let digest = BlockHash::from_wire("table_digest", &snapshot.table_digest);
        let content = SealedDisk {
            disk: &disk,
            size_bytes: snapshot.size_bytes,
            logical_sector_bytes: snapshot.logical_sector_bytes,
            table_digest: digest.map_err(|_| changed(snapshot, "its digest is none"))?,
        };
        if !seal.proves(&key, &content) {
            return Err(changed(snapshot, "the seal is not that of this content"));
        }
        let sealed_as = self.wishes.sealed_as.as_ref();
        if snapshot.machine != seal.machine.as_str() && sealed_as != Some(&seal.machine) {
            return Err(SealError::OtherMachine {
                snapshot: id(),
                server: snapshot.server_id.clone(),
                sealed_as: seal.machine,
                machine: snapshot.machine.clone(),
            });
        }
        let sealer = Sealer::new(key, seal.machine);
        Ok(Some(Arc::new(sealer.disk(&disk, snapshot.size_bytes)?)))
    }

    fn key_for(&self, snapshot: &Snapshot, wanted: KeyId) -> Result<Arc<MasterKey>, SealError> {
        let snapshot = snapshot.snapshot_id.clone();
        match &self.key {
            None => Err(SealError::Locked { snapshot, wanted, why: self.why.clone() }),
            Some(key) if key.id() != wanted => {
                let (found, path) = (key.id(), self.path.clone());
                Err(SealError::OtherKey { snapshot, wanted, found, path })
            }
            Some(key) => Ok(key.clone()),
        }
    }
}

fn changed(snapshot: &Snapshot, what: &'static str) -> SealError {
    SealError::Changed {
        snapshot: snapshot.snapshot_id.clone(),
        server: snapshot.server_id.clone(),
        disk: snapshot.disk_id.clone(),
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(key: Option<u8>, is_sealing: bool, wishes: Wishes) -> Keys {
        let key = key.map(|byte| Arc::new(MasterKey::of([byte; 32])));
        Keys { path: "/k".into(), key, why: "no file".into(), is_sealing, wishes }
    }

    fn snapshot() -> Snapshot {
        let sealer = Sealer::new(Arc::new(MasterKey::of([1; 32])), "a/b".parse().unwrap());
        let disk = "c".parse().unwrap();
        let content = SealedDisk {
            disk: &disk,
            size_bytes: 8192,
            logical_sector_bytes: 512,
            table_digest: BlockHash([7; 32]),
        };
        Snapshot {
            snapshot_id: "s".into(),
            server_id: "x".into(),
            machine: "a/b".into(),
            disk_id: "c".into(),
            size_bytes: 8192,
            logical_sector_bytes: 512,
            table_digest: vec![7; 32].into(),
            client_seal: sealer.run(9, &[content]).into(),
            ..Snapshot::default()
        }
    }

    #[test]
    fn only_what_was_sealed_here_is_opened_and_what_is_wrong_is_named() {
        let none = Wishes::default;
        let right = snapshot();
        let opened = keys(Some(1), true, none()).open(&right).unwrap().unwrap();
        let sealer = opened.sealer().disk(&"c".parse().unwrap(), 8192).unwrap();
        assert_eq!(opened.kind(), sealer.kind());
        // Whoever doesn't seal any more still reads what was.
        assert!(keys(Some(1), false, none()).open(&right).unwrap().is_some());
        let refused = |keys: &Keys, snapshot: &Snapshot| keys.open(snapshot).unwrap_err();
        let (mine, other) = (keys(Some(1), true, none()), keys(Some(2), true, none()));
        assert!(matches!(refused(&other, &right), SealError::OtherKey { .. }));
        let locked = refused(&keys(None, false, none()), &right);
        assert!(locked.to_string().contains("no file"), "{locked}");
        type Change = fn(&mut Snapshot);
        let changes: [Change; 6] = [
            |s| s.table_digest = vec![8; 32].into(),
            |s| s.table_digest = vec![7; 31].into(),
            |s| s.disk_id = "d".into(),
            |s| s.size_bytes = 4096,
            |s| s.logical_sector_bytes = 4096,
            |s| s.client_seal = s.client_seal.slice(..s.client_seal.len() - 1),
        ];
        for change in changes {
            let mut changed = right.clone();
            change(&mut changed);
            let refused = refused(&mine, &changed);
            assert!(matches!(refused, SealError::Changed { .. }), "{refused}");
        }
        let newer = Snapshot { client_seal: vec![9].into(), ..right.clone() };
        assert!(matches!(refused(&mine, &newer), SealError::Newer { version: 9, .. }));
        // Kept under another name: only for who knows that.
        let renamed = Snapshot { machine: "a/z".into(), ..right };
        assert!(matches!(refused(&mine, &renamed), SealError::OtherMachine { .. }));
        let wishes = Wishes { sealed_as: Some("a/b".parse().unwrap()), ..none() };
        assert!(keys(Some(1), true, wishes).open(&renamed).unwrap().is_some());
    }

    #[test]
    fn what_is_not_sealed_is_refused_where_all_should_be() {
        let plain = Snapshot { client_seal: Default::default(), ..snapshot() };
        assert!(keys(None, false, Wishes::default()).open(&plain).unwrap().is_none());
        let refused = keys(Some(1), true, Wishes::default()).open(&plain).unwrap_err();
        assert!(refused.to_string().contains("--allow-unsealed"), "{refused}");
        let allowed = Wishes { allow_unsealed: true, ..Wishes::default() };
        assert!(keys(Some(1), true, allowed).open(&plain).unwrap().is_none());
    }
}
