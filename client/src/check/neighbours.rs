//! Hardware addresses of hosts on a local link, as the kernel has learnt them by talking to these hosts.

use std::{net::IpAddr, time::Duration};

use janus_proto::channel::Target;
use tokio::{net::TcpStream, process::Command, time::timeout};

/// How long a host on a local link may take to answer.
const ANSWER: Duration = Duration::from_secs(1);

/// As [`of`] a URL by which nobody has talked to its host yet: whatever comes of the attempt, the kernel has asked for its address.
pub async fn reached(url: &str) -> Option<String> {
    let target = Target::parse(url).ok()?;
    let _ = timeout(ANSWER, TcpStream::connect((target.host(), target.port()))).await;
    of(url).await
}

/// Hardware address of the host of a URL; `None` when it isn't on a local link, or nobody knows.
pub async fn of(url: &str) -> Option<String> {
    let target = Target::parse(url).ok()?;
    let addresses: Vec<_> =
        tokio::net::lookup_host((target.host(), target.port())).await.ok()?.collect();
    let mut arp = None;
    for address in addresses {
        let found = match address.ip() {
            IpAddr::V4(ip) => {
                if arp.is_none() {
                    arp =
                        Some(tokio::fs::read_to_string("/proc/net/arp").await.unwrap_or_default());
                }
                in_arp(arp.as_deref().unwrap_or_default(), &ip.to_string())
            }
            // There is no file for IPv6.
            IpAddr::V6(ip) => in_neigh(&neigh(&ip.to_string()).await),
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

async fn neigh(address: &str) -> String {
    // Where system programs are need not be in the path.
    for program in ["ip", "/usr/sbin/ip", "/sbin/ip"] {
        let mut command = Command::new(program);
        command.args(["-6", "neigh", "show", "to", address]).kill_on_drop(true);
        if let Ok(output) = command.output().await {
            return String::from_utf8_lossy(&output.stdout).into_owned();
        }
    }
    String::new()
}

/// `192.168.1.5  0x1  0x2  00:11:22:33:44:55  *  eth0`; a flag of 0x2 says that the address is known.
fn in_arp(table: &str, address: &str) -> Option<String> {
    table.lines().find_map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let [ip, "0x1", flags, mac, ..] = words.as_slice() else { return None };
        let flags = u32::from_str_radix(flags.strip_prefix("0x")?, 16).ok()?;
        (*ip == address && flags & 2 != 0).then(|| (*mac).to_owned())
    })
}

/// `fd77:1::2 dev eth0 lladdr 00:11:22:33:44:55 REACHABLE`.
fn in_neigh(text: &str) -> Option<String> {
    let mut words = text.lines().next()?.split_whitespace();
    words.find(|word| *word == "lladdr")?;
    words.next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_kernel_knows_is_told() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
             192.168.1.5      0x1         0x2         00:11:22:33:44:55     *        eth0\n\
             192.168.1.6      0x1         0x0         00:00:00:00:00:00     *        eth0\n";
        assert_eq!(in_arp(table, "192.168.1.5").as_deref(), Some("00:11:22:33:44:55"));
        assert_eq!(in_arp(table, "192.168.1.6"), None);
        assert_eq!(in_arp(table, "192.168.1.7"), None);
        let neigh = "fd77:1::2 dev eth0 lladdr 00:11:22:33:44:66 REACHABLE\n";
        assert_eq!(in_neigh(neigh).as_deref(), Some("00:11:22:33:44:66"));
        assert_eq!(in_neigh("fd77:1::3 dev eth0 FAILED\n"), None);
        assert_eq!(in_neigh(""), None);
    }
}
