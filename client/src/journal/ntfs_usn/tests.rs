use super::{Distrust, record::UsnRecord};

/// A record of a version with its numbers where the Windows SDK has them.
fn record(major: u16, len: usize, usn: u64, reason: u32) -> Vec<u8> {
    let (usn_at, reason_at) = match major {
        2 => (24, 40),
        3 => (40, 56),
        _ => (40, 48),
    };
    let mut bytes = vec![0; len];
    bytes[..4].copy_from_slice(&(len as u32).to_le_bytes());
    bytes[4..6].copy_from_slice(&major.to_le_bytes());
    bytes[8..16].copy_from_slice(&0x0002_0000_0000_0030u64.to_le_bytes());
    bytes[usn_at..usn_at + 8].copy_from_slice(&usn.to_le_bytes());
    bytes[reason_at..reason_at + 4].copy_from_slice(&reason.to_le_bytes());
    bytes
}

#[test]
fn records_of_all_versions_of_ntfs_are_read() {
    for (major, len) in [(2, 64), (3, 80), (4, 64)] {
        let page = [record(major, len, 4096, 0x8000_0001), vec![0; 100]].concat();
        let read = UsnRecord::parse(&page, 4096).unwrap().unwrap();
        assert_eq!((read.usn, read.file, read.len), (4096, 0x0002_0000_0000_0030, len as u64));
        assert!(read.closes());
        let open = UsnRecord::parse(&record(major, len, 4096, 1), 4096).unwrap().unwrap();
        assert!(!open.closes());
        for cut in 4..len {
            assert!(UsnRecord::parse(&page[..cut], 4096).is_err(), "version {major}, {cut} bytes");
        }
    }
}

#[test]
fn what_is_no_record_of_its_place_is_not_understood() {
    let not_understood =
        |bytes: &[u8]| matches!(UsnRecord::parse(bytes, 4096), Err(Distrust::NotUnderstood { .. }));
    assert!(not_understood(&record(5, 64, 4096, 1)), "an unknown version");
    assert!(not_understood(&record(2, 64, 4104, 1)), "of another place");
    assert!(not_understood(&record(2, 56, 4096, 1)), "too short");
    let mut wide = record(3, 80, 4096, 1);
    wide[16] = 1;
    assert!(not_understood(&wide), "a reference of ReFS");
    assert!(UsnRecord::parse(&[0; 64], 4096).unwrap().is_none(), "the end of a page");
    let mut late = [0; 64];
    late[63] = 1;
    assert!(not_understood(&late), "something after the end");
}
