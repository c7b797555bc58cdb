//! Volumes of LVM: which one a device is, and command lines for their snapshots.
//!
//! A snapshot of ours has a name that begins with `janus-` and the tag `janus-backup`; nothing else is ever removed.

use serde::Deserialize;

use super::program::{Line, ProgramError};

/// Tag of our snapshots.
const TAG: &str = "janus-backup";
const LVS: &str = "--reportformat json --options vg_name,lv_name,lv_attr,origin,lv_tags,lv_kernel_major,lv_kernel_minor";

/// How much a snapshot of a thick volume can take up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotSize {
    is_share: bool,
    text: String,
}

impl std::str::FromStr for SnapshotSize {
    type Err = ();

    /// `10%ORIGIN`, `20%FREE`, `5%VG`, or a size with its unit: `5G`.
    fn from_str(text: &str) -> Result<Self, ()> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let is_share = ["%ORIGIN", "%FREE", "%VG"].contains(&unit);
        let is_size = ["M", "G", "T"].contains(&unit);
        let is_some = number.parse::<u32>().is_ok_and(|number| number > 0);
        let fits = is_some && (is_share || is_size);
        if fits { Ok(Self { is_share, text: text.to_owned() }) } else { Err(()) }
    }
}

/// A volume with a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Volume {
    group: String,
    name: String,
    /// Its snapshots take space of its pool as they need it.
    is_thin: bool,
}

/// A snapshot of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Snapshot {
    group: String,
    origin: String,
    name: String,
    is_thin: bool,
}

impl Volume {
    /// `GROUP/NAME`.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }

    /// The snapshot of it that [`make_line`] makes.
    pub(super) fn snapshot(&self, name: &str) -> Snapshot {
        let (group, origin) = (self.group.clone(), self.name.clone());
        Snapshot { group, origin, name: name.to_owned(), is_thin: self.is_thin }
    }
}

impl Snapshot {
    /// `GROUP/NAME`.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.group, self.name)
    }

    /// Its device.
    pub(super) fn device(&self) -> String {
        format!("/dev/{}/{}", self.group, self.name)
    }

    /// True when it was too small for what was written to its volume meanwhile; false also when nobody knows.
    pub(super) fn has_overflowed(&self) -> bool {
        let Ok(volumes) = list() else { return false };
        !self.is_thin
            && volumes.iter().any(|one| {
                one.vg_name == self.group
                    && one.lv_name == self.name
                    && matches!(one.lv_attr.as_bytes().get(4), Some(b'I' | b'S'))
            })
    }
}

/// Makes a snapshot. LVM itself freezes a file system directly on the volume meanwhile.
pub(super) fn make_line(snapshot: &Snapshot, size: &SnapshotSize) -> Line {
    let origin = format!("{}/{}", snapshot.group, snapshot.origin);
    let head = "--yes --snapshot --permission r --addtag";
    let mut words = vec![TAG, "--name", &snapshot.name];
    if snapshot.is_thin {
        // Else it would have no device until somebody activates it with a flag for that.
        words.extend(["--setactivationskip", "n"]);
    } else {
        words.extend([if size.is_share { "--extents" } else { "--size" }, &size.text]);
    }
    words.push(&origin);
    Line::new("lvcreate", head, &words)
}

/// Removes a snapshot.
pub(super) fn remove_line(snapshot: &Snapshot) -> Line {
    Line::new("lvremove", "--yes", &[&snapshot.name()])
}

/// All volumes with devices, and what they are.
fn list_line() -> Line {
    Line::new("lvs", LVS, &[])
}

/// The volume with this device, and snapshots of it that an earlier client has left; `None` when it is none.
///
/// # Errors
/// When LVM can't tell. A system without LVM has no volumes.
pub(super) fn find(
    major: u32,
    minor: u32,
) -> Result<Option<(Volume, Vec<Snapshot>)>, ProgramError> {
    match list() {
        Ok(volumes) => Ok(find_in(&volumes, major, minor)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}

fn list() -> Result<Vec<Listed>, ProgramError> {
    let line = list_line();
    let parsed: Result<Answer, _> = serde_json::from_str(&line.run()?);
    let answer = parsed.map_err(|error| ProgramError::Answer {
        command: line.to_string(),
        reason: error.to_string(),
    })?;
    Ok(answer.report.into_iter().flat_map(|report| report.lv).collect())
}

fn find_in(volumes: &[Listed], major: u32, minor: u32) -> Option<(Volume, Vec<Snapshot>)> {
    let (major, minor) = (major.to_string(), minor.to_string());
    let is_it = |one: &&Listed| one.lv_kernel_major == major && one.lv_kernel_minor == minor;
    let it = volumes.iter().find(is_it)?;
    let left = volumes.iter().filter(|one| one.is_ours_of(it)).map(|one| Snapshot {
        group: one.vg_name.clone(),
        origin: one.origin.clone(),
        name: one.lv_name.clone(),
        is_thin: one.is_thin(),
    });
    let (group, name) = (it.vg_name.clone(), it.lv_name.clone());
    Some((Volume { group, name, is_thin: it.is_thin() }, left.collect()))
}

#[derive(Deserialize)]
struct Answer {
    report: Vec<Report>,
}

#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    lv: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    vg_name: String,
    lv_name: String,
    lv_attr: String,
    origin: String,
    lv_tags: String,
    lv_kernel_major: String,
    lv_kernel_minor: String,
}

impl Listed {
    fn is_thin(&self) -> bool {
        self.lv_attr.starts_with('V')
    }

    fn is_ours_of(&self, origin: &Self) -> bool {
        self.vg_name == origin.vg_name
            && self.origin == origin.lv_name
            && self.lv_name.starts_with(super::PREFIX)
            && self.lv_tags.split(',').any(|tag| tag == TAG)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(name: &str, attr: &str, origin: &str, tags: &str, minor: i32) -> String {
        format!(
            r#"{{"vg_name":"vg0", "lv_name":"{name}", "lv_attr":"{attr}", "origin":"{origin}", "lv_tags":"{tags}", "lv_kernel_major":"253", "lv_kernel_minor":"{minor}"}}"#
        )
    }

    fn parse(volumes: &[String]) -> Vec<Listed> {
        let text = format!(r#"{{"report": [{{"lv": [{}]}}], "log": []}}"#, volumes.join(","));
        let answer: Answer = serde_json::from_str(&text).unwrap();
        answer.report.into_iter().flat_map(|report| report.lv).collect()
    }

    #[test]
    fn a_volume_is_found_by_its_device_and_only_our_snapshots_of_it_are_left_overs() {
        let volumes = parse(&[
            listed("root", "owi-aos---", "", "", 0),
            listed("thin", "Vwi-aotz--", "", "", 1),
            listed("janus-1", "swi-aos---", "root", "a,janus-backup", 2),
            listed("janus-2", "swi-aos---", "root", "", 3),
            listed("nightly", "swi-aos---", "root", "janus-backup", 4),
            listed("janus-3", "Vri-aotz-k", "thin", "janus-backup", 5),
            listed("janus-4", "-wi-a-----", "", "janus-backup", 6),
        ]);
        let (root, left) = find_in(&volumes, 253, 0).unwrap();
        assert_eq!((root.name().as_str(), root.is_thin), ("vg0/root", false));
        assert_eq!(left.iter().map(Snapshot::name).collect::<Vec<_>>(), ["vg0/janus-1"]);
        let (thin, left) = find_in(&volumes, 253, 1).unwrap();
        assert_eq!((thin.is_thin, left[0].device().as_str()), (true, "/dev/vg0/janus-3"));
        assert!(find_in(&volumes, 8, 0).is_none());
    }

    #[test]
    fn command_lines_of_thick_and_thin_volumes() {
        let volume = |is_thin| Volume { group: "vg0".into(), name: "root".into(), is_thin };
        let line = |is_thin, size: &str| {
            let size = size.parse().unwrap();
            make_line(&volume(is_thin).snapshot("janus-1"), &size).to_string()
        };
        let head = "lvcreate --yes --snapshot --permission r --addtag janus-backup --name janus-1";
        assert_eq!(line(false, "10%ORIGIN"), format!("{head} --extents 10%ORIGIN vg0/root"));
        assert_eq!(line(false, "5G"), format!("{head} --size 5G vg0/root"));
        assert_eq!(line(true, "5G"), format!("{head} --setactivationskip n vg0/root"));
        let removed = remove_line(&volume(false).snapshot("janus-1"));
        assert_eq!(removed.to_string(), "lvremove --yes vg0/janus-1");
        assert_eq!(
            list_line().to_string(),
            "lvs --reportformat json --options vg_name,lv_name,lv_attr,origin,lv_tags,lv_kernel_major,lv_kernel_minor"
        );
    }

    #[test]
    fn sizes_are_shares_or_have_a_unit() {
        for good in ["10%ORIGIN", "100%FREE", "5%VG", "5G", "512M", "1T"] {
            assert!(good.parse::<SnapshotSize>().is_ok(), "{good}");
        }
        for bad in ["", "5", "G", "0G", "10%", "-5G", "5G --force", "99999999999G", "10%PVS"] {
            assert!(bad.parse::<SnapshotSize>().is_err(), "{bad}");
        }
    }
}
