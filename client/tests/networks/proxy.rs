//! Through a real HTTP proxy.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use xtask::{
    disk, packages,
    site::{Client, Plan, Programs, Site},
};

const MIB: u64 = 1 << 20;
const PASSWORD: &str = "s3cret-of-alice";

struct Tinyproxy {
    child: Child,
    port: u16,
    log: PathBuf,
}

impl Tinyproxy {
    fn start(folder: &Path, more: &str) -> Self {
        packages::require(packages::PROXY_TOOLS).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (config, log) = (folder.join("tinyproxy.conf"), folder.join("tinyproxy.log"));
        let text = format!(
            "Port {port}\nListen 127.0.0.1\nTimeout 600\nLogLevel Connect\nLogFile \"{}\"\n{more}\n",
            log.display()
        );
        fs::write(&config, text).unwrap();
        let child = Command::new("tinyproxy").arg("-d").arg("-c").arg(&config).spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "tinyproxy does not start");
            thread::sleep(Duration::from_millis(20));
        }
        Self { child, port, log }
    }

    fn connects(&self) -> usize {
        let log = fs::read_to_string(&self.log).unwrap();
        log.lines().filter(|line| line.contains("CONNECT 127.0.0.1:")).count()
    }
}

impl Drop for Tinyproxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn scene() -> (Site, Client, PathBuf) {
    let plan = Plan { servers: vec!["ours".into()], janus: false, folder: None };
    let site = Site::start(Programs::for_tests().unwrap(), &plan).unwrap();
    let path = site.folder().join("disk.raw");
    disk::blank(&path, 8 * MIB).unwrap();
    disk::write_noise(&path, 0..8 * MIB, 5).unwrap();
    let client = site.client("laptop", &[format!("disk={}", path.display())]).unwrap();
    (site, client, path)
}

#[test]
fn a_backup_and_a_restore_go_through_a_proxy_that_wants_a_password() {
    let (site, mut client, path) = scene();
    let proxy = Tinyproxy::start(site.folder(), &format!("BasicAuth alice {PASSWORD}"));
    let at = format!("127.0.0.1:{}", proxy.port);
    client.settings.set("log", "trace");
    client.settings.set("proxy", format!("http://alice:{PASSWORD}@{at}"));
    let finished = client.run(&["backup", "--json"]).unwrap();
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(!finished.stderr.contains(PASSWORD) && !finished.stdout.contains(PASSWORD));
    let to = site.folder().join("back.raw");
    client.restore("disk", &to).unwrap();
    disk::compare(&path, &to).unwrap();
    let carried = proxy.connects();
    println!("carried by tinyproxy: {carried} connections");
    assert!(carried >= 2, "{carried}");

    // Without the password, and with a wrong one.
    for wrong in [format!("http://{at}"), format!("http://alice:not-{PASSWORD}@{at}")] {
        client.settings.set("proxy", wrong);
        let finished = client.run(&["list", "--json"]).unwrap();
        println!("{}", finished.stdout.trim());
        assert_eq!(finished.code, Some(3));
        assert!(finished.stdout.contains(&format!("proxy {at} ")), "{}", finished.stdout);
        assert!(!(finished.stdout.clone() + &finished.stderr).contains(PASSWORD));
    }
    client.settings.set("proxy", format!("socks5://alice:{PASSWORD}@{at}"));
    let failure = client.failure(&["list"]).unwrap();
    assert_eq!(failure.exit_code, 2, "{failure:?}");
    assert!(failure.error.contains("http://USER") && !failure.error.contains(PASSWORD));
}

#[test]
fn the_environment_says_which_proxy_and_what_goes_without() {
    let (site, mut client, _) = scene();
    let proxy = Tinyproxy::start(site.folder(), "");
    let url = format!("http://127.0.0.1:{}", proxy.port);
    let mut list = |setting: &str, environment: &[(&str, &str)]| {
        client.settings.set("proxy", setting);
        client.settings.write(&client.config()).unwrap();
        let mut command = Programs::for_tests().unwrap().client();
        command.args(["list", "--config"]).arg(client.config());
        let before = proxy.connects();
        command.envs(environment.iter().copied());
        packages::output(&mut command).unwrap();
        proxy.connects() - before
    };
    let https = ("https_proxy", url.as_str());
    assert_eq!(list("", &[]), 0);
    assert_eq!(list("", &[https]), 1);
    assert_eq!(list("", &[https, ("no_proxy", "10.0.0.0/8,127.0.0.0/8")]), 0);
    assert_eq!(list("none", &[https]), 0);
    assert_eq!(list(&url, &[]), 1);
}

#[test]
fn a_proxy_that_is_away_or_refuses_is_named_with_the_way_out() {
    let (site, mut client, _) = scene();
    let proxy = Tinyproxy::start(site.folder(), "ConnectPort 443");
    client.settings.set("proxy", format!("http://127.0.0.1:{}", proxy.port));
    let refused = client.failure(&["list"]).unwrap();
    println!("{}", refused.error);
    assert!(refused.error.contains("must allow CONNECT to this port"), "{refused:?}");
    drop(proxy);
    let away = client.failure(&["list"]).unwrap();
    println!("{}", away.error);
    assert!(away.error.contains("can't be reached: connection refused"), "{away:?}");
    assert_eq!((refused.exit_code, away.exit_code), (3, 3));
}
