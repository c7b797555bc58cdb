//! A snapshot read at any offset through a real janus from a real server, also while these are killed and started again.

use std::{fs, path::PathBuf, time::Duration};

use janus_client::{
    link::Direct,
    packing::Wish,
    snapshot::{Opened, Selection, SnapshotMedium, opened::Reach},
    source::medium::Medium,
    ways::Ways,
};
use janus_proto::{pb::Encoding, tls::Identity};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::runtime::Runtime;
use xtask::{
    disk,
    site::{Client, Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB + 512;

fn scene() -> (Site, Client, Vec<u8>) {
    let mut site = Site::prepare(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    site.start_all().unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, SIZE).unwrap();
    for (seed, range) in [5..9, 20..60, 95..96].into_iter().enumerate() {
        disk::write_noise(&path, range.start * MIB..range.end * MIB, seed as u64).unwrap();
    }
    disk::write_noise(&path, 70 * MIB + 4096..70 * MIB + 8192, 9).unwrap();
    let client = site.client("machine", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    client.backup().unwrap();
    (site, client, fs::read(path).unwrap())
}

fn medium(site: &Site, client: &Client, runtime: &Runtime, wish: Wish) -> SnapshotMedium {
    let path = |key: &str| PathBuf::from(client.settings.get(key).unwrap().as_str().unwrap());
    let identity = Identity::load(path("cert"), path("key"), path("ca"));
    let reach = Reach {
        ways: Ways::direct(vec![site.url()], identity.unwrap()),
        direct: Direct::Never,
        failover_after: Duration::from_secs(30),
        machine: None,
    };
    let selection = Selection::parse("disk", None, None, None).unwrap();
    let found = runtime.block_on(selection.find(&reach.ways)).unwrap();
    let opened = Opened::new(reach, found).unwrap();
    SnapshotMedium::new(opened, None, wish, 0, runtime.handle().clone())
}

fn compare(medium: &SnapshotMedium, content: &[u8], rng: &mut StdRng, most: u64) {
    let offset = rng.random_range(0..SIZE);
    let len = rng.random_range(1..=most).min(SIZE - offset) as usize;
    let mut buffer = vec![1; len];
    Medium::read_exact_at(medium, &mut buffer, offset).unwrap();
    assert!(buffer == content[offset as usize..offset as usize + len], "{offset} {len}");
}

#[test]
fn reads_are_right_in_any_order_and_in_little_memory() {
    let (site, client, content) = scene();
    let runtime = Runtime::new().unwrap();
    for wish in [Wish::Auto, Wish::Only(Encoding::Zstd)] {
        let medium = medium(&site, &client, &runtime, wish);
        // From several threads at once.
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let (medium, content) = (&medium, &content);
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(seed);
                    (0..100).for_each(|_| compare(medium, content, &mut rng, 300_000));
                    compare(medium, content, &mut rng, 80 * MIB);
                });
            }
        });
        let mut past = [0; 2];
        let error = Medium::read_exact_at(&medium, &mut past, SIZE - 1).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn what_is_read_in_order_is_fetched_once() {
    let (site, client, content) = scene();
    let runtime = Runtime::new().unwrap();
    let medium = medium(&site, &client, &runtime, Wish::Auto);
    let mut buffer = vec![0; 10_000];
    for (at, expected) in content.chunks(buffer.len()).enumerate() {
        let now = &mut buffer[..expected.len()];
        Medium::read_exact_at(&medium, now, at as u64 * 10_000).unwrap();
        assert!(now == expected);
    }
    let fetched = medium.fetched_bytes();
    assert!((45 * MIB..46 * MIB).contains(&fetched), "{fetched}");
}

#[test]
fn holes_are_where_the_disk_is_zeros() {
    let (site, client, content) = scene();
    let runtime = Runtime::new().unwrap();
    let medium = medium(&site, &client, &runtime, Wish::Auto);
    let (mut at, mut holes) = (0, 0);
    while at < SIZE {
        let stretch = medium.stretch(at);
        assert!(stretch.end > at);
        let blocks = content[at as usize..stretch.end as usize].chunks(4096);
        for (index, block) in blocks.enumerate() {
            assert_eq!(block.iter().all(|byte| *byte == 0), stretch.hole, "{at} {index}");
        }
        holes += if stretch.hole { stretch.end - at } else { 0 };
        at = stretch.end;
    }
    assert_eq!(holes, SIZE - 45 * MIB - 4096);
    assert_eq!(medium.fetched_bytes(), 0);
}

#[test]
fn reading_goes_on_after_server_and_janus_were_killed() {
    let (mut site, client, content) = scene();
    let runtime = Runtime::new().unwrap();
    let medium = medium(&site, &client, &runtime, Wish::Auto);
    let server = medium.snapshot().server_id.clone();
    let mut rng = StdRng::seed_from_u64(7);
    let reading = medium.clone();
    let reader = std::thread::spawn(move || {
        for _ in 0..60 {
            compare(&reading, &content, &mut rng, 2 * MIB);
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(500));
        site.kill_server(&server).unwrap();
        site.start_server(&server).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        site.kill_janus().unwrap();
        site.start_janus().unwrap();
    }
    reader.join().unwrap();
}
