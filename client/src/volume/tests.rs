use std::{fs, process::Command};

use proptest::prelude::*;

use super::*;

fn run(program: &str, arguments: &[&str]) {
    let done = Command::new(program).args(arguments).output().unwrap();
    assert!(done.status.success(), "{program} {arguments:?}: {done:?}");
}

/// Two partitions by `sgdisk`, an ext4 in the second.
fn gpt_disk() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    let (disk, part) = (path.to_str().unwrap(), folder.path().join("part"));
    fs::File::create(&path).unwrap().set_len(24 << 20).unwrap();
    run(
        "sgdisk",
        &["-n1:2048:+4M", "-t1:ef00", "-c1:boot", "-n3:12288:+8M", "-t3:8300", "-c3:data", disk],
    );
    fs::File::create(&part).unwrap().set_len(8 << 20).unwrap();
    run("mkfs.ext4", &["-qF", "-L", "files", part.to_str().unwrap()]);
    let mut disk = fs::read(&path).unwrap();
    let at = 12288 * 512;
    disk[at..at + (8 << 20)].copy_from_slice(&fs::read(&part).unwrap());
    disk
}

fn entry(disk: &mut [u8], sector: usize, index: usize, kind: u8, first: u32, sectors: u32) {
    let at = sector * 512 + 446 + index * 16;
    disk[at + 4] = kind;
    disk[at + 8..at + 12].copy_from_slice(&first.to_le_bytes());
    disk[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
    disk[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xAA]);
}

/// One primary partition, and an extended one of two logical ones.
fn mbr_disk() -> Vec<u8> {
    let mut disk = vec![0; 4 << 20];
    entry(&mut disk, 0, 0, 0x83, 64, 1000);
    entry(&mut disk, 0, 1, 0x0F, 2048, 6144);
    entry(&mut disk, 2048, 0, 0x07, 64, 900);
    entry(&mut disk, 2048, 1, 0x05, 1024, 1024);
    entry(&mut disk, 3072, 0, 0x82, 64, 900);
    disk
}

fn shape(layout: &Layout) -> Vec<(u32, u64, u64, &str)> {
    let shape = |v: &'_ Volume| (v.number, v.start / 512, v.len / 512);
    layout
        .volumes
        .iter()
        .map(|v| (shape(v), &*v.type_name))
        .map(|((n, s, l), t)| (n, s, l, t))
        .collect()
}

#[test]
fn a_gpt_is_read_and_its_backup_when_the_first_is_wiped() {
    let mut disk = gpt_disk();
    let first = layout(&disk, 512).unwrap();
    assert_eq!(first.table, TableKind::Gpt);
    let expected = [(1, 2048, 8192, "EFI system"), (3, 12288, 16384, "Linux data")];
    assert_eq!(shape(&first), expected);
    let data = &first.volumes[1];
    assert_eq!((data.file_system, &*data.fs_label), (Some(FileSystemKind::Ext4), "files"));
    assert_eq!(&*data.label, "data");
    // An image file says nothing of its sectors.
    assert_eq!(layout(&disk, 4096).unwrap(), first);
    disk[512..1024].fill(0);
    let backup = layout(&disk, 512).unwrap();
    assert_eq!((backup.table, &backup.volumes), (TableKind::GptBackup, &first.volumes));
    disk[..512].fill(0);
    assert_eq!(layout(&disk, 512).unwrap(), backup);
    let end = disk.len() - 512;
    disk[end..].fill(0);
    assert_eq!(layout(&disk, 512).unwrap().volumes, []);
}

#[test]
fn a_gpt_of_large_sectors_is_read() {
    let mut disk = vec![0; 8 << 20];
    let mut gpt = gptman::GPT::new_from(&mut io::Cursor::new(&mut disk), 4096, [7; 16]).unwrap();
    gpt[1] = gptman::GPTPartitionEntry {
        partition_type_guid: [9; 16],
        unique_partition_guid: [8; 16],
        starting_lba: 100,
        ending_lba: 199,
        attribute_bits: 0,
        partition_name: "four".into(),
    };
    gpt.write_into(&mut io::Cursor::new(&mut disk)).unwrap();
    gptman::GPT::write_protective_mbr_into(&mut io::Cursor::new(&mut disk), 4096).unwrap();
    for sector_bytes in [512, 4096] {
        let layout = layout(&disk, sector_bytes).unwrap();
        assert_eq!(layout.volumes[0].range(), 409_600..819_200, "{sector_bytes}");
        assert_eq!(layout.volumes[0].label, "four");
    }
}

#[test]
fn logical_partitions_of_an_mbr_count_from_5() {
    let layout = layout(&mbr_disk(), 512).unwrap();
    let expected = [
        (1, 64, 1000, "Linux data"),
        (5, 2112, 900, "NTFS or exFAT"),
        (6, 3136, 900, "Linux swap"),
    ];
    assert_eq!((layout.table, shape(&layout)), (TableKind::Mbr, expected.to_vec()));
}

#[test]
fn a_bare_file_system_is_volume_0_even_with_a_boot_signature() {
    let mut disk = vec![0; 1 << 20];
    disk[3..11].copy_from_slice(b"NTFS    ");
    entry(&mut disk, 0, 0, 0x83, 64, 100);
    let layout = layout(&disk, 512).unwrap();
    assert_eq!(layout.table, TableKind::None);
    assert_eq!((layout.volumes[0].number, layout.volumes[0].range()), (0, 0..1 << 20));
}

#[test]
fn tables_that_contradict_themselves_are_refused() {
    let refused = |disk: &Vec<u8>, why: &str| {
        let error = layout(disk, 512).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    let mut disk = mbr_disk();
    entry(&mut disk, 0, 2, 0x83, 1000, 200);
    refused(&disk, "overlap");
    let mut disk = mbr_disk();
    entry(&mut disk, 0, 2, 0x83, 8000, u32::MAX);
    refused(&disk, "ends behind the disk");
    let mut disk = mbr_disk();
    entry(&mut disk, 3072, 1, 0x05, 1024, 1024);
    refused(&disk, "astray");
    let mut disk = gpt_disk();
    disk[592..596].fill(0xFF);
    disk[528..532].fill(0);
    let sum = crate::source::gpt::crc32(&disk[512..604]);
    disk[528..532].copy_from_slice(&sum.to_le_bytes());
    refused(&disk, "4294967295 entries");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn mutated_tables_never_panic_and_volumes_stay_within_the_disk(
        changes in prop::collection::vec((0..3usize, 0..512usize, any::<u8>()), 1..12)
    ) {
        let mut disk = mbr_disk();
        for (sector, at, byte) in changes {
            disk[[0, 2048, 3072][sector] * 512 + at] = byte;
        }
        if let Ok(layout) = layout(&disk, 512) {
            for volume in layout.volumes {
                prop_assert!(volume.start + volume.len <= 4 << 20);
            }
        }
    }
}
