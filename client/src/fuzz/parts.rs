//! Structures that are read on their own.

use crate::{
    fs::ntfs::{Boot, Record, fixups},
    journal::{
        memory::Memory,
        ntfs_usn::{self, UsnRecord},
    },
    nbd::bitmap,
    source::qcow2,
};

/// A record of an MFT: attributes, their runs and lists.
pub fn fuzz_mft_record(bytes: &[u8]) {
    let mut boot = Boot {
        cluster_bytes: 4096,
        clusters: 1 << 20,
        record_bytes: 1024,
        mft_cluster: 4,
        serial: 1,
    };
    for record_bytes in [1024, 4096, 64 << 10] {
        boot.record_bytes = record_bytes;
        let mut record = bytes[..bytes.len().min(record_bytes as usize)].to_vec();
        record.resize(record_bytes as usize, 0);
        let _ = Record::parse(7, &mut record.clone(), &boot);
        fixups::make_right(&mut record);
        if let Ok(Some(read)) = Record::parse(7, &mut record, &boot) {
            let len: usize = read.attributes.iter().map(|one| one.name.len()).sum();
            assert!(len <= 4 * bytes.len().max(1), "names of {len} bytes");
        }
    }
}

/// Records of a USN journal, one behind the other.
pub fn fuzz_usn_records(bytes: &[u8]) {
    let bytes = &bytes[..bytes.len().min(4096)];
    let mut at = 0;
    while let Some(rest) = bytes.get(at..)
        && !rest.is_empty()
    {
        let usn = 4096 + at as u64;
        let _ = UsnRecord::parse(rest, usn);
        let right = ntfs_usn::placed(rest, usn);
        match UsnRecord::parse(&right, usn) {
            Ok(Some(record)) => {
                assert!(record.len > 0 && record.len <= rest.len() as u64, "{record:?}");
                at += record.len as usize;
            }
            _ => return,
        }
    }
}

/// What `qemu-img info` says of an image, in which the words of others are.
pub fn fuzz_qcow2_info(bytes: &[u8]) {
    qcow2::read_info(bytes);
}

/// What the cache remembers of journals.
pub fn fuzz_cursor(bytes: &[u8]) {
    let _ = Memory::parse(bytes);
    ntfs_usn::read_cursor(bytes);
    if let Some(name) = bitmap::remembered(bytes) {
        assert!(bitmap::is_ours(&name), "{name}");
    }
}

/// A record of each version.
pub(super) fn usn_seeds() -> Vec<Vec<u8>> {
    let record = |major: u16, len: u32| {
        let mut record = vec![0; len as usize];
        record[..4].copy_from_slice(&len.to_le_bytes());
        record[4..6].copy_from_slice(&major.to_le_bytes());
        record[8] = 0x30;
        record
    };
    [record(2, 64), record(3, 80), record(4, 64)]
        .map(|one| ntfs_usn::placed(&one, 4096))
        .into_iter()
        .chain([[record(2, 64), record(4, 64), record(3, 96), vec![0; 64]].concat()])
        .collect()
}

pub(super) fn qcow2_seeds() -> Vec<Vec<u8>> {
    let bitmap =
        r#"{"flags":["auto"],"name":"janus-0123456789abcdef0123456789abcdef","granularity":65536}"#;
    let info = |more: &str| {
        format!(
            r#"{{"virtual-size":67108864,"filename":"x","cluster-size":65536,"format":"qcow2","actual-size":200704,{more}
            "format-specific":{{"type":"qcow2","data":{{"compat":"1.1","bitmaps":[{bitmap}],"corrupt":false}}}}}}"#
        )
    };
    let backed = info(r#""backing-filename":"base.qcow2","#);
    vec![info("").into(), backed.into(), br#"{"format":"raw","virtual-size":512}"#.to_vec()]
}

pub(super) fn cursor_seeds() -> Vec<Vec<u8>> {
    let bitmap =
        br#"{"format":1,"bitmap":"janus-0123456789abcdef0123456789abcdef","size_bytes":512}"#;
    vec![bitmap.to_vec(), ntfs_usn::a_cursor(), Memory::default().to_bytes()]
}
