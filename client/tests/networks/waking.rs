//! Magic packets, as they are seen on the line.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use xtask::{
    disk, packages,
    site::{Client, MACHINES, Part, Programs, SITES, Sites, url},
};

const MAC: &str = "02:00:5e:10:20:30";
const MIB: u64 = 1 << 20;
/// The kernel hands packets to tcpdump about once a second.
const LATE: Duration = Duration::from_secs(2);

/// tcpdump on the router's end of the machines' line.
struct Watch {
    child: Child,
    file: PathBuf,
}

impl Watch {
    fn begin(sites: &Sites, place: &str, folder: &Path) -> Self {
        packages::require(packages::PROXY_TOOLS).unwrap();
        let file = folder.join("packets.pcap");
        let mut command = Command::new("tcpdump");
        command.args(["-Z", "root", "-U", "-n", "-i", place, "-w"]).arg(&file).arg("udp port 9");
        let mut child = sites.network().at_router(&command).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stderr.take().unwrap()).read_line(&mut said).unwrap();
        assert!(said.contains("listening on"), "{said}");
        Self { child, file }
    }

    /// Magic packets so far, looked for in what was captured.
    fn packets(&self) -> usize {
        self.packets_for(MAC)
    }

    fn packets_for(&self, mac: &str) -> usize {
        let bytes: Vec<u8> =
            mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        let magic: Vec<u8> = [0xff; 6].into_iter().chain(bytes.repeat(16)).collect();
        // tcpdump may not have made it yet.
        let captured = fs::read(&self.file).unwrap_or_default();
        captured.windows(magic.len()).filter(|part| *part == magic).count()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn as_root_a_server_that_sleeps_gets_packets_and_is_waited_for() {
    let mut sites = Sites::prepare(Programs::for_tests().unwrap()).unwrap();
    let path = sites.folder().join("disk.raw");
    disk::blank(&path, 4 * MIB).unwrap();
    let mut client = sites.client("laptop", &[format!("disk={}", path.display())]).unwrap();
    client.settings.set("wake", json!([format!("{MAC}@255.255.255.255")]));
    client.settings.set("boot_seconds", 3);
    let watch = Watch::begin(&sites, MACHINES, sites.folder());

    // Nobody wakes up.
    let began = Instant::now();
    let failure = client.failure(&["backup"]).unwrap();
    let gave_up = began.elapsed();
    assert_eq!(failure.exit_code, 3, "{failure:?}");
    assert!((3..12).contains(&gave_up.as_secs()), "not before boot_seconds are over: {gave_up:?}");
    let packets = watch.packets();
    assert!(packets >= 2, "{packets}");

    // One does, after a while.
    client.settings.set("boot_seconds", 60);
    let began = Instant::now();
    let backing = client.start(&["backup", "--json"]).unwrap();
    thread::sleep(Duration::from_secs(3));
    sites.start_part(SITES[0], Part::Server).unwrap();
    sites.start_part(SITES[0], Part::Janus).unwrap();
    let finished = backing.wait().unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    println!(
        "{packets} packets before giving up after {gave_up:.1?}; then {} more, and a backup after {:.1?}",
        watch.packets() - packets,
        began.elapsed()
    );
    assert!(watch.packets() > packets && began.elapsed() < Duration::from_secs(20));

    // Nothing is sent where nothing is set.
    thread::sleep(LATE);
    let before = watch.packets();
    client.settings.set("wake", json!([]));
    client.backup().unwrap();
    thread::sleep(LATE);
    assert_eq!(watch.packets(), before);
}

/// The machine knows nothing of it: janus is on, and its servers sleep.
#[test]
fn as_root_a_janus_that_is_awake_wakes_its_servers_for_who_asks() {
    let mut sites = Sites::prepare(Programs::for_tests().unwrap()).unwrap();
    let path = sites.folder().join("disk.raw");
    disk::blank(&path, 4 * MIB).unwrap();
    let mut client = sites.client("laptop", &[format!("disk={}", path.display())]).unwrap();
    client.settings.set("boot_seconds", 3);
    let watch = Watch::begin(&sites, SITES[0], sites.folder());

    // One that knows of nobody to wake is not waited for.
    sites.start_part(SITES[0], Part::Janus).unwrap();
    let failure = client.failure(&["backup"]).unwrap();
    assert_eq!(failure.reason.as_deref(), Some("NO_SERVER_READY"), "{failure:?}");
    sites.kill(SITES[0], Part::Janus).unwrap();

    // Nobody wakes up. The time of the other entry is far away; the host is the same, and gets its packets once.
    let alarms = json!([MAC, format!("22:00 {MAC}")]);
    sites.settings.get_mut(&(SITES[0], Part::Janus)).unwrap().set("wake", alarms);
    sites.start_part(SITES[0], Part::Janus).unwrap();
    assert_eq!(watch.packets(), 0);
    let began = Instant::now();
    let failure = client.failure(&["backup"]).unwrap();
    assert_eq!(failure.exit_code, 3, "{failure:?}");
    assert!((3..15).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    thread::sleep(LATE);
    let packets = watch.packets();
    assert_eq!(packets, 2, "once in five seconds, in two copies");

    // They do, after a while.
    client.settings.set("boot_seconds", 60);
    let began = Instant::now();
    let backing = client.start(&["backup", "--json"]).unwrap();
    thread::sleep(Duration::from_secs(6));
    sites.start_part(SITES[0], Part::Server).unwrap();
    let finished = backing.wait().unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    thread::sleep(LATE);
    println!(
        "{packets} packets before giving up; then {} more, and a backup after {:.1?}",
        watch.packets() - packets,
        began.elapsed()
    );
    assert!(watch.packets() > packets && began.elapsed() < Duration::from_secs(25));

    // With a server that is awake nobody else is woken.
    let before = watch.packets();
    client.backup().unwrap();
    thread::sleep(LATE);
    assert_eq!(watch.packets(), before);
}

#[test]
fn as_root_a_janus_wakes_servers_at_their_time() {
    let mut sites = Sites::prepare(Programs::for_tests().unwrap()).unwrap();
    let watch = Watch::begin(&sites, SITES[0], sites.folder());
    let time = |ahead: u64| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let minutes = (now.as_secs() + ahead) / 60;
        format!("{:02}:{:02}", minutes / 60 % 24, minutes % 60)
    };
    // The minute after this one, and one that is far away. Programs run in UTC here.
    let alarms = [time(60), time(12 * 3600)].map(|time| format!("{time} {MAC}"));
    sites.settings.get_mut(&(SITES[0], Part::Janus)).unwrap().set("wake", json!(alarms));
    sites.start_part(SITES[0], Part::Janus).unwrap();
    let until = Instant::now() + Duration::from_secs(100);
    while watch.packets() == 0 {
        assert!(Instant::now() < until, "{}", sites.log(SITES[0], Part::Janus));
        thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(watch.packets(), 2, "once, in two copies");
}

/// From a neighbour of the servers, which the router is, `test` sees their hardware addresses, by IPv4 and by IPv6.
#[test]
fn as_root_addresses_that_test_has_seen_are_remembered_for_waking() {
    let mut sites = Sites::prepare(Programs::for_tests().unwrap()).unwrap();
    // Both families: `0.0.0.0`, as these sites have it, is IPv4 alone.
    sites.settings.get_mut(&(SITES[1], Part::Janus)).unwrap().set("listen", "[::]:7420");
    sites.heal().unwrap();
    let path = sites.folder().join("disk.raw");
    disk::blank(&path, 4 * MIB).unwrap();
    let mut client = sites.client("laptop", &[format!("disk={}", path.display())]).unwrap();
    sites.await_equal(&client, Duration::from_secs(30)).unwrap();
    let by_v6 = format!("https://[{}]:7420", sites.network().address6(SITES[1]));
    client.settings.set("urls", json!([url(SITES[0], 7420), by_v6]));
    client.settings.set("wake", json!(["remembered"]));
    let test = |client: &Client| {
        client.settings.write(&client.config()).unwrap();
        let mut command = Programs::for_tests().unwrap().client();
        command.args(["test", "--json", "--config"]).arg(client.config());
        let output = sites.network().at_router(&command).output().unwrap();
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let answer = test(&client);
    let mac = |site: &str| {
        let mut command = Command::new("cat");
        command.arg("/sys/class/net/eth0/address");
        let text = packages::output(&mut sites.network().command(site, &command)).unwrap();
        text.trim().to_owned()
    };
    let macs = SITES.map(mac);
    for (mac, url) in macs.iter().zip(answer["urls"].as_array().unwrap()) {
        println!("{}: {mac}", url["url"]);
        assert_eq!(url["mac"], *mac, "{answer}");
    }

    let watch = Watch::begin(&sites, MACHINES, sites.folder());
    client.backup().unwrap();
    thread::sleep(LATE);
    assert_eq!(macs.each_ref().map(|mac| watch.packets_for(mac)), [2, 2]);

    // One janus is enough: the servers behind it are neighbours as well.
    client.settings.set("urls", json!([url(SITES[0], 7420)]));
    let answer = test(&client);
    for (mac, site) in macs.iter().zip(SITES) {
        assert_eq!(answer["urls"][0]["behind"][site], *mac, "{answer}");
    }
    client.backup().unwrap();
    thread::sleep(LATE);
    assert_eq!(macs.each_ref().map(|mac| watch.packets_for(mac)), [4, 4]);
}
