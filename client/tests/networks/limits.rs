//! What may travel by the time of day.

use serde_json::json;
use xtask::{
    disk,
    site::{Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;

/// A part of the day that begins `from` hours after now, and ends `to` hours after it.
fn window(from: i64, to: i64) -> String {
    let at = |hours| jiff::ZonedDateTime::now() + jiff::SignedDuration::from_hours(hours);
    let (from, to) = (at(from), at(to));
    format!("{:02}:{:02}-{:02}:{:02}", from.hour(), from.minute(), to.hour(), to.minute())
}

#[test]
fn a_backup_keeps_to_the_limit_of_its_time_of_day() {
    let site = Site::start(Programs::for_tests().unwrap(), &Plan::default()).unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 6 * MIB).unwrap();
    let mut client = site.client("laptop", &[format!("disk={}", path.display())]).unwrap();
    site.await_ready(&client).unwrap();
    let mut rate = |seed: u64, hours: (i64, i64)| {
        disk::write_noise(&path, 0..6 * MIB, seed).unwrap();
        let limits = [format!("{} 16 Mbit/s", window(hours.0, hours.1))];
        client.settings.set("bandwidth", json!(limits));
        let backup = client.backup().unwrap();
        assert_eq!(backup.disks[0].sent_bytes, 6 * MIB, "{backup:?}");
        let rate = 6.0 * 8.388_608 / backup.seconds;
        println!("{}: {rate:.1} Mbit/s", limits[0]);
        rate
    };
    let (within, outside) = (rate(1, (-1, 1)), rate(2, (2, 4)));
    assert!((8.0..16.5).contains(&within), "{within}");
    assert!(outside > 1.5 * within, "{outside} where nothing limits it");
}
