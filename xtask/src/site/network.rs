//! A small internet of network namespaces: one for each place, all joined by a router's. Needs root.
//!
//! Every place has one line to the router: `eth0` on its side. Lines are cut and slowed at the router, so that the places
//! themselves notice nothing but silence (or what a router answers). Namespaces are named by this process: what a
//! killed process left behind is removed when the next network is made.

use std::{
    fs,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::process;
use crate::packages::{self, output};

const PREFIX: &str = "janus";
const ROUTER: &str = "router";
/// Where `ip netns exec` finds files that replace those of `/etc`.
const ETC: &str = "/etc/netns";
/// What a router's queue holds at most, as time: about that of a line at home.
const QUEUE: &str = "200ms";

static MADE: AtomicU32 = AtomicU32::new(0);

/// The network.
#[derive(Debug)]
pub struct Network {
    name: String,
    places: Vec<String>,
}

/// How a line, or the way between two places, is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Packets vanish.
    Drop,
    /// The router answers that the way is closed.
    Reject,
    /// The line has no carrier. Only of a place's whole line.
    Down,
}

impl Network {
    /// Makes a namespace for each place and joins them. Names of hosts are `<place>.example.org` everywhere.
    ///
    /// # Errors
    /// When we aren't root or a tool fails.
    pub fn make(places: &[&str]) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "this test needs root: it makes network namespaces"
        );
        packages::require(packages::NETWORK_TOOLS)?;
        let name =
            format!("{PREFIX}-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let network = Self { name, places: places.iter().map(|&place| place.to_owned()).collect() };
        for left in left_behind(&network.name)? {
            remove(&left);
        }
        network.add(ROUTER)?;
        let router = network.namespace(ROUTER);
        ip_at(&router, "link set lo up")?;
        let forward = ["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"];
        run(&router, "sysctl", &["-q", "-w", forward[0], forward[1]])?;
        for place in places {
            network.join(place)?;
        }
        Ok(network)
    }

    fn add(&self, place: &str) -> Result<()> {
        let namespace = self.namespace(place);
        ip(&format!("netns add {namespace}"))?;
        let etc = Path::new(ETC).join(&namespace);
        fs::create_dir_all(&etc).with_context(|| format!("make {}", etc.display()))?;
        let host = |place: &String| {
            let (v4, v6) = (self.address(place), self.address6(place));
            format!("{v4} {place}.example.org {place}\n{v6} {place}6.example.org\n")
        };
        let hosts: String = self.places.iter().map(host).collect();
        fs::write(etc.join("hosts"), format!("127.0.0.1 localhost\n{hosts}"))?;
        Ok(())
    }

    fn join(&self, place: &str) -> Result<()> {
        self.add(place)?;
        let (here, router) = (self.namespace(place), self.namespace(ROUTER));
        ip(&format!("link add eth0 netns {here} type veth peer name {place} netns {router}"))?;
        ip_at(&router, &format!("address add {}/24 dev {place}", self.gateway(place)))?;
        ip_at(&here, "link set lo up")?;
        ip_at(&here, &format!("address add {}/24 dev eth0", self.address(place)))?;
        self.router_up(place)?;
        self.plug_in(place)
    }

    /// The router's end of a line. A device that went down has lost its IPv6 address.
    fn router_up(&self, place: &str) -> Result<()> {
        let (router, gateway6) = (self.namespace(ROUTER), self.gateway6(place));
        ip_at(&router, &format!("link set {place} up"))?;
        ip_at(&router, &format!("-6 address replace {gateway6}/64 dev {place} nodad"))
    }

    /// Brings a place's own end up, with the addresses and routes that a host's network manager brings back.
    ///
    /// # Errors
    /// When that fails.
    pub fn plug_in(&self, place: &str) -> Result<()> {
        let here = self.namespace(place);
        ip_at(&here, "link set eth0 up")?;
        ip_at(&here, &format!("-6 address replace {}/64 dev eth0 nodad", self.address6(place)))?;
        ip_at(&here, &format!("route replace default via {}", self.gateway(place)))?;
        ip_at(&here, &format!("-6 route replace default via {} dev eth0", self.gateway6(place)))
    }

    /// Takes all IPv4 away, that of loopback too.
    ///
    /// # Errors
    /// When a tool fails.
    pub fn only_ipv6(&self) -> Result<()> {
        for place in &self.places {
            for device in ["eth0", "lo"] {
                ip_at(&self.namespace(place), &format!("-4 address flush dev {device}"))?;
            }
        }
        Ok(())
    }

    /// A command that runs at the router what `command` would run here.
    pub fn at_router(&self, command: &Command) -> Command {
        inside(&self.namespace(ROUTER), command)
    }

    /// A command that runs at a place what `command` would run here.
    pub fn command(&self, place: &str, command: &Command) -> Command {
        inside(&self.namespace(place), command)
    }

    /// Name of a place's namespace.
    pub fn namespace(&self, place: &str) -> String {
        format!("{}-{place}", self.name)
    }

    /// A place's address.
    pub fn address(&self, place: &str) -> String {
        format!("10.77.{}.2", self.number(place))
    }

    /// A place's IPv6 address; `<place>6.example.org` leads there.
    pub fn address6(&self, place: &str) -> String {
        format!("fd77:{}::2", self.number(place))
    }

    fn gateway6(&self, place: &str) -> String {
        format!("fd77:{}::1", self.number(place))
    }

    fn gateway(&self, place: &str) -> String {
        format!("10.77.{}.1", self.number(place))
    }

    fn number(&self, place: &str) -> usize {
        1 + self.places.iter().position(|other| other == place).unwrap_or(self.places.len())
    }

    /// Cuts a place off from all others.
    ///
    /// # Errors
    /// When a tool fails.
    pub fn cut(&self, place: &str, how: Cut) -> Result<()> {
        if how == Cut::Down {
            return ip_at(&self.namespace(ROUTER), &format!("link set {place} down"));
        }
        let net = self.net(place);
        self.rule(self.number(place) * 100, &format!("from {net}"), how)?;
        self.rule(self.number(place) * 100, &format!("to {net}"), how)
    }

    /// Cuts the way between two places, both ways.
    ///
    /// # Errors
    /// When a tool fails.
    pub fn cut_between(&self, one: &str, other: &str, how: Cut) -> Result<()> {
        ensure!(how != Cut::Down, "a line is down for all");
        let (from, to) = (self.net(one), self.net(other));
        let number = 1000 + self.number(one) * self.number(other);
        self.rule(number, &format!("from {from} to {to}"), how)?;
        self.rule(number, &format!("from {to} to {from}"), how)
    }

    fn net(&self, place: &str) -> String {
        format!("10.77.{}.0/24", self.number(place))
    }

    fn rule(&self, number: usize, which: &str, how: Cut) -> Result<()> {
        let action = if how == Cut::Reject { "prohibit" } else { "blackhole" };
        ip_at(&self.namespace(ROUTER), &format!("rule add priority {number} {which} {action}"))
    }

    /// Limits a place's line in both directions, in kbit/s.
    ///
    /// # Errors
    /// When a tool fails.
    pub fn slow(&self, place: &str, kbit: u32) -> Result<()> {
        for (namespace, device) in
            [(self.namespace(ROUTER), place), (self.namespace(place), "eth0")]
        {
            // Enough for a large segment, and for what arrives within a tick of the timer.
            let burst = (kbit / 8).max(32);
            let words = format!(
                "qdisc replace dev {device} root tbf rate {kbit}kbit burst {burst}kb latency {QUEUE}"
            );
            output(packages::command("tc").arg("-n").arg(&namespace).args(words.split(' ')))?;
        }
        Ok(())
    }

    /// Takes the limit of a place's line away, if there is one.
    ///
    /// # Errors
    /// When a tool fails.
    pub fn fast(&self, place: &str) -> Result<()> {
        for (namespace, device) in
            [(self.namespace(ROUTER), place), (self.namespace(place), "eth0")]
        {
            // There is always one to replace, and the one by default has no limit.
            let words = format!("qdisc replace dev {device} root pfifo_fast");
            output(packages::command("tc").arg("-n").arg(&namespace).args(words.split(' ')))?;
        }
        Ok(())
    }

    /// Makes everything whole again: no cuts, all lines up. Slow lines stay slow.
    ///
    /// # Errors
    /// When a tool fails.
    pub fn heal(&self) -> Result<()> {
        let router = self.namespace(ROUTER);
        let rules = output(packages::command("ip").args(["-n", &router, "rule"]))?;
        let numbers = rules.lines().filter_map(|line| line.split_once(':')?.0.parse::<u32>().ok());
        for number in numbers.filter(|number| (1..32_000).contains(number)) {
            ip_at(&router, &format!("rule del priority {number}"))?;
        }
        self.places.iter().try_for_each(|place| self.router_up(place))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for place in self.places.iter().map(String::as_str).chain([ROUTER]) {
            remove(&self.namespace(place));
        }
    }
}

/// A command that runs in a namespace what `command` would run here.
pub(super) fn inside(namespace: &str, command: &Command) -> Command {
    let mut inside = packages::command("ip");
    inside.args(["netns", "exec", namespace]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => inside.env(name, value),
            None => inside.env_remove(name),
        };
    }
    inside
}

/// Moves the calling thread into a namespace.
pub(super) fn enter(namespace: &str) -> Result<()> {
    let file = fs::File::open(Path::new("/run/netns").join(namespace))?;
    rustix::thread::move_into_link_name_space(
        file.as_fd(),
        Some(rustix::thread::LinkNameSpaceType::Network),
    )
    .context("enter a network namespace")
}

fn run(namespace: &str, program: &str, arguments: &[&str]) -> Result<()> {
    let mut command = packages::command(program);
    command.args(arguments);
    output(&mut inside(namespace, &command)).map(drop)
}

fn ip(words: &str) -> Result<()> {
    output(packages::command("ip").args(words.split(' '))).map(drop)
}

fn ip_at(namespace: &str, words: &str) -> Result<()> {
    ip(&format!("-n {namespace} {words}"))
}

/// Namespaces of processes that are gone, and those that an earlier process of our number left.
fn left_behind(ours: &str) -> Result<Vec<String>> {
    let is_left = |namespace: &str| {
        let owner = namespace.strip_prefix(PREFIX)?.strip_prefix('-')?.split('-').next()?;
        let is_gone = !PathBuf::from(format!("/proc/{}", owner.parse::<u32>().ok()?)).exists();
        Some(is_gone || namespace.starts_with(&format!("{ours}-")))
    };
    let list = output(packages::command("ip").args(["netns", "list"]))?;
    let names = list.lines().filter_map(|line| line.split_whitespace().next());
    Ok(names.filter(|name| is_left(name) == Some(true)).map(str::to_owned).collect())
}

/// Removes a namespace with whatever still runs in it.
fn remove(namespace: &str) {
    let pids = output(packages::command("ip").args(["netns", "pids", namespace]));
    for pid in pids.iter().flat_map(|pids| pids.lines()).filter_map(|pid| pid.trim().parse().ok()) {
        process::signal(pid, Signal::KILL);
    }
    // Another run may be removing the same.
    let _ = ip(&format!("netns del {namespace}"));
    let _ = fs::remove_dir_all(Path::new(ETC).join(namespace));
    let _ = fs::remove_dir(ETC);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_root_what_a_killed_process_left_behind_is_removed() {
        // A number that no process has: one that has just ended.
        let mut ended = Command::new("true").spawn().unwrap();
        let gone = ended.id();
        ended.wait().unwrap();
        let left = format!("{PREFIX}-{gone}-0-north");
        packages::require(packages::NETWORK_TOOLS).unwrap();
        ip(&format!("netns add {left}")).unwrap();
        let mut sleeper = inside(&left, Command::new("sleep").arg("600")).spawn().unwrap();
        // `ip` has changed its namespace by the time it is `sleep`.
        let name = format!("/proc/{}/comm", sleeper.id());
        while fs::read_to_string(&name).unwrap().trim() != "sleep" {}

        let network = Network::make(&["north", "south"]).unwrap();
        let list = || output(packages::command("ip").args(["netns", "list"])).unwrap();
        assert!(!list().contains(&left), "{}", list());
        assert!(!sleeper.wait().unwrap().success());
        assert!(list().contains(&network.namespace("south")));
        let ours = network.namespace("");
        drop(network);
        assert!(!list().contains(&ours), "{}", list());
    }
}
