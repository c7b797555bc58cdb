//! Onto something: only what differs is fetched and written.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
};

use xtask::{disk, loopback::LoopDevice, noise::Noise};

use crate::{
    meter::Meter,
    scene::{MIB, Scene},
};

/// So many single blocks all over the disk, which is the worst place for them.
fn scatter(path: &std::path::Path, size: u64, blocks: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let mut noise = Noise::new(Noise::fresh_seed());
    let step = size / 4096 / blocks;
    for number in 0..blocks {
        let mut data = [0; 4096];
        noise.fill(&mut data);
        file.write_all_at(&data, (number * step + noise.below(step)) * 4096).unwrap();
    }
    file.sync_all().unwrap();
}

#[test]
fn rolling_back_one_percent_moves_little_more_than_that() {
    const SIZE: u64 = 128 * MIB;
    let mut scene = Scene::new(&["server-a"], SIZE);
    let taken = scene.backup();
    let meter = Meter::before(&scene.site.url());
    scene.client.settings.set("urls", serde_json::json!([meter.url()]));
    let blocks = SIZE / 4096 / 100;
    let roll_back = |name: &str, in_place: bool| {
        let path = scene.path(name);
        disk::copy(&taken.copy, &path).unwrap();
        scatter(&path, SIZE, blocks);
        meter.take();
        let mut more = vec!["--force", "--verify"];
        more.extend(in_place.then_some("--in-place"));
        let report = scene.restore(&taken, &path, &more);
        let wire = meter.take();
        disk::compare(&taken.copy, &path).unwrap();
        let share = wire as f64 * 100.0 / SIZE as f64;
        println!(
            "1 % of {} MiB in {blocks} single blocks, {name}: {wire} bytes on the wire = {share:.3} %; {report:?}",
            SIZE / MIB
        );
        assert!(share <= 1.2, "{share} %");
        assert_eq!(report.fetched_bytes, blocks * 4096);
        assert_eq!((report.verified_bytes, report.read_back_bytes), (SIZE, SIZE));
        report
    };
    let in_place = roll_back("in-place", true);
    assert_eq!((in_place.read_bytes, in_place.written_bytes), (SIZE, blocks * 4096));
    roll_back("beside", false);
    // Nothing differs: nothing but digests travels.
    meter.take();
    scene.restore(&taken, &scene.path("beside"), &["--force"]);
    let nothing = meter.take();
    println!("nothing differs: {nothing} bytes on the wire");
    assert!(nothing < 64 << 10, "{nothing}");
    let full = scene.restore(&taken, &scene.path("beside"), &["--force", "--full"]);
    assert_eq!((full.read_bytes, full.fetched_bytes), (0, SIZE));
    disk::compare(&taken.copy, &scene.path("beside")).unwrap();
}

/// The other one's snapshot differs from the wanted one in nearly every segment, which takes the most hashes.
#[test]
fn rolling_back_from_two_servers_moves_hardly_more() {
    const SIZE: u64 = 128 * MIB;
    let mut scene = Scene::new(&["server-a", "server-b"], SIZE);
    let taken = scene.backup();
    scatter(&scene.disk, SIZE, SIZE / 4096 / 100);
    assert_ne!(scene.backup().server, taken.server);
    let meter = Meter::before(&scene.site.url());
    scene.client.settings.set("urls", serde_json::json!([meter.url()]));
    let report = scene.restore(&taken, &scene.disk, &["--force", "--in-place"]);
    let share = meter.take() as f64 * 100.0 / SIZE as f64;
    println!("1 % back, two servers: {share:.3} % on the wire; {report:?}");
    disk::compare(&taken.copy, &scene.disk).unwrap();
    assert!(share <= 1.2, "{share} %");
}

#[test]
fn zeros_and_data_take_each_others_place() {
    let scene = Scene::new(&["server-a"], 40 * MIB + 3 * 512);
    let disk = OpenOptions::new().write(true).open(&scene.disk).unwrap();
    // A segment of zeros, zeros within one, and a hole over two of them.
    disk.write_all_at(&vec![0; 4 << 20], 8 * MIB).unwrap();
    disk.write_all_at(&vec![0; 999 * 4096], 17 * MIB).unwrap();
    disk.write_all_at(&vec![0; 8 << 20], 27 * MIB).unwrap();
    let taken = scene.backup();
    for (number, size) in [40 * MIB + 3 * 512, 33 * MIB + 512, 64 * MIB].into_iter().enumerate() {
        for more in [&["--force"][..], &["--force", "--in-place"], &["--force", "--full"]] {
            let path = scene.path(&format!("target-{number}"));
            disk::blank(&path, size).unwrap();
            disk::write_noise(&path, 2 * MIB..12 * MIB, 7).unwrap();
            disk::write_noise(&path, 26 * MIB..30 * MIB, 7).unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&fs::read(&taken.copy).unwrap()[20 << 20..24 << 20], 20 * MIB)
                .unwrap();
            let report = scene.restore(&taken, &path, more);
            disk::compare(&taken.copy, &path).unwrap();
            assert_eq!(report.verified_bytes, report.size_bytes, "{report:?}");
            assert!(disk::allocated_bytes(&path).unwrap() < 30 * MIB, "zeros are holes again");
        }
    }
}

#[test]
fn as_root_a_device_gets_only_what_differs() {
    const SIZE: u64 = 32 * MIB;
    let scene = Scene::new(&["server-a"], SIZE);
    let taken = scene.backup();
    let image = scene.path("device.img");
    disk::copy(&taken.copy, &image).unwrap();
    disk::write_noise(&image, 9 * MIB..10 * MIB, 5).unwrap();
    {
        let device = LoopDevice::attach(&image).unwrap();
        let report = scene.restore(&taken, device.path(), &["--force", "--verify"]);
        assert_eq!((report.read_bytes, report.written_bytes), (SIZE, MIB), "{report:?}");
        assert_eq!((report.verified_bytes, report.read_back_bytes), (SIZE, SIZE), "{report:?}");
        let report = scene.restore(&taken, device.path(), &["--force", "--full"]);
        assert_eq!((report.read_bytes, report.written_bytes), (0, SIZE), "{report:?}");
    }
    disk::compare(&taken.copy, &image).unwrap();
}
