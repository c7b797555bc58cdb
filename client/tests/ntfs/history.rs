//! Random lives of a volume, and what is promised after each step.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use janus_client::journal::{Journal, ntfs_usn::NtfsUsn};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};

use super::scene::{Changed, Library, Volume};

const CREATE: u32 = 0x100;
const DELETE: u32 = 0x200;
const RENAME: u32 = 0x2000;
const OVERWRITE: u32 = 1;
const CLOSE: u32 = 0x8000_0000;
const FIRST_USN: u64 = 1 << 18;
/// A volume's flag.
const DELETE_UNDERWAY: u32 = 0x10;

/// What happens to a journal, or past it.
const EVENTS: [&str; 12] = [
    "rolled back",
    "rolled back and written past the cursor",
    "journal deleted and made anew",
    "journal stamped anew",
    "journal wrapped",
    "journal deleted",
    "journal being deleted",
    "journal truncated",
    "journal truncated and written on",
    "journal corrupted",
    "moved without a record",
    "not at rest",
];
/// Why a journal wasn't believed, as far as the text is the same each time.
const REASONS: [&str; 8] = [
    "there is no change journal",
    "the change journal was made anew",
    "the change journal was deleted",
    "the change journal was stopped meanwhile",
    "the change journal no longer reaches back to the last backup",
    "the volume was rolled back",
    "the volume is not at rest",
    "the change journal can't be understood",
];

/// What was seen over all histories.
#[derive(Default)]
pub struct Totals {
    histories: u32,
    steps: u32,
    trusted: u32,
    promised_clusters: u64,
    read_clusters: u64,
    events: BTreeMap<&'static str, u32>,
    /// Records of each version.
    records: BTreeMap<u64, usize>,
    reasons: BTreeMap<String, u32>,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { histories, steps, trusted, promised_clusters, read_clusters, .. } = self;
        let Self { events, records, reasons, .. } = self;
        write!(
            f,
            "{histories} histories, {steps} steps: {trusted} by the journal ({promised_clusters} clusters unread, \
             {read_clusters} read), else {reasons:?}; events: {events:?}; records by version: {records:?}"
        )
    }
}

impl Totals {
    /// The property says nothing when nothing is promised, or nothing ever distrusted, or nothing happens.
    pub fn assert_worth(&self) {
        assert!(self.trusted * 3 > self.steps, "{self}");
        assert!(self.promised_clusters * 10 > self.read_clusters, "{self}");
        let missing = EVENTS.iter().find(|event| !self.events.contains_key(*event));
        assert_eq!(missing, None, "{self}");
        assert!(self.records.keys().eq(&[2, 3, 4]), "{self}");
        let missing = REASONS.iter().find(|reason| !self.reasons.contains_key(**reason));
        assert_eq!(missing, None, "{self}");
    }
}

/// What a roll-back brings back.
#[derive(Clone)]
struct World {
    image: Vec<u8>,
    files: BTreeMap<String, u64>,
    open: BTreeSet<String>,
    journal: u64,
    next_usn: u64,
}

/// Stands for the reference of a file that is about to be made.
const UNMADE: u64 = 1 << 63;

/// One life.
pub struct History<'a> {
    library: &'a mut Library,
    random: SmallRng,
    seed: u64,
    volume: Volume,
    /// Files that exist, with their references.
    files: BTreeMap<String, u64>,
    /// Files that somebody has open: the journal has one record of their overwriting, and no more come.
    open: BTreeSet<String>,
    made: u32,
    journal: u64,
    next_usn: u64,
    records: Vec<(u64, u32)>,
    /// What happened since the totals were asked.
    events: Vec<&'static str>,
    /// How many records of which version were written since.
    written: BTreeMap<u64, usize>,
    /// What the last backup saw, and what it remembered.
    backup: Option<(World, Vec<u8>)>,
    trace: Vec<String>,
}

impl<'a> History<'a> {
    pub fn new(library: &'a mut Library, seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let cluster_bytes = [512, 4096, 4096, 16384][random.random_range(0..4)];
        let mut volume = Volume::new(16, cluster_bytes);
        library.change(&mut volume, vec![json!(["journal", 1, FIRST_USN])], true);
        Self {
            library,
            random,
            seed,
            volume,
            files: BTreeMap::new(),
            open: BTreeSet::new(),
            made: 0,
            journal: 1,
            next_usn: FIRST_USN,
            records: Vec::new(),
            events: Vec::new(),
            written: BTreeMap::new(),
            backup: None,
            trace: Vec::new(),
        }
    }

    pub fn play(mut self, totals: &mut Totals) {
        totals.histories += 1;
        self.grow();
        for _ in 0..self.random.random_range(4..9) {
            let event = self.random.random_range(0..24);
            let changed = self.step(event, totals);
            totals.steps += 1;
            self.check(&changed, totals);
        }
        for event in self.events {
            *totals.events.entry(event).or_default() += 1;
        }
        for (version, count) in self.written {
            *totals.records.entry(version).or_default() += count;
        }
    }

    /// Some files, and a first backup.
    pub fn grow(&mut self) {
        let mut operations = vec![json!(["mkdir", "/d"])];
        for _ in 0..self.random.random_range(8..20) {
            self.create(&mut operations);
        }
        let changed = self.commit(operations);
        let answer = NtfsUsn::new(&self.volume.file()).changes(None);
        assert!(answer.changes.is_err());
        self.backup = Some((self.world(), answer.next.unwrap()));
        drop(changed);
    }

    /// An image and a cursor that fits it.
    pub fn damage_parts(&self) -> (Vec<u8>, Vec<u8>) {
        let (world, cursor) = self.backup.clone().unwrap();
        (world.image, cursor)
    }

    fn say(&mut self, what: impl Into<String>) {
        self.trace.push(what.into());
    }

    fn event(&mut self, event: &'static str) {
        self.say(event);
        self.events.push(event);
    }

    fn world(&self) -> World {
        World {
            image: self.volume.bytes(),
            files: self.files.clone(),
            open: self.open.clone(),
            journal: self.journal,
            next_usn: self.next_usn,
        }
    }

    fn put_back(&mut self, world: World) {
        self.volume.put_back(&world.image);
        (self.files, self.open) = (world.files, world.open);
        (self.journal, self.next_usn) = (world.journal, world.next_usn);
    }

    /// Honest changes, and now and then something else before, after or instead.
    fn step(&mut self, event: u32, totals: &mut Totals) -> Changed {
        let mut operations = Vec::new();
        if event == 0 {
            // An older state, and other changes from there.
            if let Some((world, _)) = self.backup.clone()
                && self.random.random_bool(0.5)
            {
                self.put_back(world);
            }
            let older = self.world();
            let mut later = Vec::new();
            self.changes(&mut later);
            self.commit(later);
            self.take_backup();
            self.put_back(older);
            self.event("rolled back");
        }
        self.changes(&mut operations);
        // A volume at rest has no open file. Where the journal has the record of one it is taken at its word; where that
        // record is lost nobody could know of it.
        if matches!(event, 1..=5 | 9 | 10) && (event != 3 || self.backup.is_none()) {
            self.open.clear();
        }
        match event {
            1 => {
                self.event("journal deleted and made anew");
                self.journal += 1;
                self.next_usn = FIRST_USN;
                operations.extend([
                    json!(["delete_journal"]),
                    json!(["journal", self.journal, FIRST_USN]),
                ]);
            }
            2 => {
                self.event("journal stamped anew");
                self.journal += self.random.random_range(0..2);
                self.next_usn = self.next_usn.next_multiple_of(4096);
                operations.extend([
                    json!(["delete_journal"]),
                    json!(["journal", self.journal, self.next_usn, self.next_usn]),
                ]);
            }
            3 => {
                self.event("journal wrapped");
                for _ in 0..self.random.random_range(0..120) {
                    let Some(name) = self.any_file() else { break };
                    self.note(&name, OVERWRITE | CLOSE);
                    self.open.remove(&name);
                }
                self.commit(std::mem::take(&mut operations));
                let first = ((self.next_usn - 1) / 4096 * 4096).max(FIRST_USN);
                if first < self.next_usn {
                    operations.push(json!(["keep_tail", first, self.next_usn, self.journal]));
                }
                return self.send(operations, true);
            }
            4 => {
                self.event("journal deleted");
                operations.push(json!(["delete_journal"]));
                let changed = self.send(operations, true);
                return self.without_journal(&changed, Vec::new(), totals);
            }
            5 => {
                self.event("journal corrupted");
                let at = FIRST_USN
                    + self.random.random_range(0..self.next_usn.max(FIRST_USN + 8) - FIRST_USN);
                let bytes: [u8; 8] = self.random.random();
                // Behind what is about to be written it would only be overwritten.
                let changed = self.commit(std::mem::take(&mut operations));
                let corrupt = json!(["corrupt", at.min(self.next_usn - 8), hex::encode(bytes)]);
                drop(changed);
                return self.send(vec![corrupt], true);
            }
            6 | 7 => {
                self.event("moved without a record");
                if let Some(file) = self.any_file() {
                    operations.push(json!(["move", file]));
                }
            }
            8 => {
                self.event("not at rest");
                let changed = self.commit_as(operations, false);
                self.check_only(&changed, totals);
                return self.send(Vec::new(), true);
            }
            9 => {
                self.event("journal truncated");
                self.commit(std::mem::take(&mut operations));
                // At the border of two records nobody could tell that there were more.
                let most = if self.random.random_bool(0.5) { 200 } else { 3000 };
                let back = self.random.random_range(1..most).min(self.next_usn - FIRST_USN);
                let cut = json!(["cut_journal", self.next_usn - back, self.next_usn]);
                let changed = self.send(vec![cut], true);
                self.next_usn = changed.answers[0].as_u64().unwrap_or(self.next_usn);
                if self.random.random_bool(0.5) {
                    return changed;
                }
                self.event("journal truncated and written on");
                self.changes(&mut operations);
            }
            10 => {
                self.event("journal being deleted");
                operations.push(json!(["flags", DELETE_UNDERWAY]));
                let changed = self.send(operations, true);
                let end = vec![json!(["flags", 0]), json!(["delete_journal"])];
                return self.without_journal(&changed, end, totals);
            }
            _ => {}
        }
        let changed = self.commit(operations);
        if event == 0
            && let Some((world, _)) = &self.backup
            && self.next_usn > world.next_usn
        {
            self.event("rolled back and written past the cursor");
        }
        changed
    }

    /// Compares what is promised while the journal is gone or going; then there is a new one.
    fn without_journal(
        &mut self,
        changed: &Changed,
        mut operations: Vec<Value>,
        totals: &mut Totals,
    ) -> Changed {
        self.records.clear();
        self.journal += 1;
        self.next_usn = FIRST_USN;
        self.check_only(changed, totals);
        operations.push(json!(["journal", self.journal, FIRST_USN]));
        self.send(operations, true)
    }

    fn changes(&mut self, operations: &mut Vec<Value>) {
        for _ in 0..self.random.random_range(0..6) {
            match self.random.random_range(0..10) {
                0..=1 => self.create(operations),
                2 => self.delete(operations),
                3 => self.rename(operations),
                4 => self.truncate(operations),
                5 => self.close_one(),
                _ => self.overwrite(operations),
            }
        }
    }

    fn any_file(&mut self) -> Option<String> {
        let names: Vec<_> = self.files.keys().cloned().collect();
        (!names.is_empty()).then(|| names[self.random.random_range(0..names.len())].clone())
    }

    fn length(&mut self) -> u64 {
        match self.random.random_range(0..4) {
            0 => self.random.random_range(1..600),
            1 => self.random.random_range(1..20_000),
            _ => self.random.random_range(1..300_000),
        }
    }

    fn create(&mut self, operations: &mut Vec<Value>) {
        self.made += 1;
        let folder = if self.random.random_bool(0.3) { "/d" } else { "" };
        let name = format!("{folder}/f{}", self.made);
        let length = self.length();
        operations.push(json!(["write", name, 0, length, self.made, true]));
        // Its reference comes with the answer.
        self.files.insert(name, UNMADE | u64::from(self.made));
    }

    fn overwrite(&mut self, operations: &mut Vec<Value>) {
        let Some(name) = self.any_file() else { return };
        let (offset, length) = (self.random.random_range(0..100_000), self.length());
        let seed = self.random.random_range(0..1000);
        operations.push(json!(["write", name, offset, length, seed, false]));
        if self.open.contains(&name) {
            // It is open and has a record already.
            self.say(format!("{name} overwritten again"));
        } else if self.random.random_bool(0.25) && self.files[&name] & UNMADE == 0 {
            // One that is made in this step has a record that closes it.
            self.say(format!("{name} stays open"));
            self.note(&name, OVERWRITE);
            self.open.insert(name);
        } else {
            self.note(&name, OVERWRITE | CLOSE);
        }
    }

    fn truncate(&mut self, operations: &mut Vec<Value>) {
        let Some(name) = self.any_file() else { return };
        operations.push(json!(["truncate", name, self.length()]));
        self.note(&name, 4 | CLOSE);
        self.open.remove(&name);
    }

    fn delete(&mut self, operations: &mut Vec<Value>) {
        let Some(name) = self.any_file() else { return };
        operations.push(json!(["delete", name]));
        self.note(&name, DELETE | CLOSE);
        self.open.remove(&name);
        self.files.remove(&name);
    }

    fn rename(&mut self, operations: &mut Vec<Value>) {
        let Some(name) = self.any_file() else { return };
        self.made += 1;
        let to = format!("/g{}", self.made);
        operations.push(json!(["rename", name, to]));
        self.note(&name, RENAME | CLOSE);
        self.open.remove(&name);
        let reference = self.files.remove(&name).unwrap();
        self.files.insert(to, reference);
    }

    fn close_one(&mut self) {
        let Some(name) = self.open.pop_first() else { return };
        self.note(&name, OVERWRITE | CLOSE);
    }

    /// A record to come. A file made in this step has no reference yet, and its making is a record anyway.
    fn note(&mut self, name: &str, reason: u32) {
        let reference = self.files[name];
        if reference & UNMADE == 0 {
            self.records.push((reference, reason));
        }
    }

    fn commit(&mut self, operations: Vec<Value>) -> Changed {
        self.commit_as(operations, true)
    }

    /// Carries changes out, and then the records of them.
    fn commit_as(&mut self, operations: Vec<Value>, clean: bool) -> Changed {
        let changed = self.send(operations.clone(), true);
        let mut records = std::mem::take(&mut self.records);
        for (operation, answer) in operations.iter().zip(&changed.answers) {
            if operation[0] == "write" && operation[5] == true {
                let reference = answer.as_u64().unwrap();
                records.push((reference, CREATE | CLOSE));
            }
        }
        let version = self.random.random_range(2..5);
        for (_, reason) in &records {
            let is_range = version == 4 && reason & OVERWRITE != 0;
            let written = if version == 4 && !is_range { 3 } else { version };
            *self.written.entry(written).or_default() += 1;
        }
        let changed = self.send(vec![json!(["records", self.next_usn, records, version])], clean);
        self.next_usn = changed.answers[0].as_u64().unwrap();
        changed
    }

    fn send(&mut self, operations: Vec<Value>, clean: bool) -> Changed {
        operations.iter().for_each(|operation| self.trace.push(operation.to_string()));
        let changed = self.library.change(&mut self.volume, operations.clone(), clean);
        // From now on the references of new files are known.
        for (operation, answer) in operations.iter().zip(&changed.answers) {
            if operation[0] == "write" && operation[5] == true {
                let unmade = UNMADE | operation[4].as_u64().unwrap();
                if let Some(known) = self.files.values_mut().find(|known| **known == unmade) {
                    *known = answer.as_u64().unwrap();
                }
            }
        }
        changed
    }

    fn take_backup(&mut self) {
        let cursor = self.backup.take().map(|(_, cursor)| cursor);
        let answer = NtfsUsn::new(&self.volume.file()).changes(cursor.as_deref());
        self.backup = answer.next.map(|next| (self.world(), next));
    }

    /// Compares what is promised with what is so, without a backup.
    fn check_only(&mut self, changed: &Changed, totals: &mut Totals) {
        let backup = self.backup.clone();
        totals.steps += 1;
        self.check(changed, totals);
        self.backup = backup;
    }

    fn check(&mut self, changed: &Changed, totals: &mut Totals) {
        let now = self.volume.bytes();
        let Some((World { image: then, .. }, cursor)) = self.backup.clone() else {
            return self.take_backup();
        };
        let answer = NtfsUsn::new(&self.volume.file()).changes(Some(&cursor));
        match &answer.changes {
            Ok(changes) => {
                totals.trusted += 1;
                self.compare(&then, &now, changed, changes);
                let unread = now.len() as u64 - changes.changed.total();
                let cluster = self.volume.cluster_bytes();
                totals.promised_clusters += unread.saturating_sub(changes.free.total()) / cluster;
                totals.read_clusters += changes.changed.total() / cluster;
            }
            Err(reason) => {
                let reason = reason.to_string();
                let kind = reason.split(':').next().unwrap_or_default().to_owned();
                *totals.reasons.entry(kind).or_default() += 1;
            }
        }
        // Some backups fail: then the old cursor counts from the old state on.
        if self.random.random_bool(0.8) {
            self.backup = answer.next.map(|next| (self.world(), next));
        } else {
            self.say("a backup failed");
        }
    }

    fn compare(
        &self,
        then: &[u8],
        now: &[u8],
        changed: &Changed,
        changes: &janus_client::journal::Changes,
    ) {
        let size = self.volume.cluster_bytes() as usize;
        for (cluster, (old, new)) in then.chunks(size).zip(now.chunks(size)).enumerate() {
            let at = (cluster * size) as u64;
            let is_cluster = (cluster as u64) < self.volume.clusters();
            let is_used = !is_cluster || changed.is_used(cluster as u64);
            assert!(
                !(is_used && changes.free.contains(at)),
                "seed {}: cluster {cluster} is called free: {:#?}",
                self.seed,
                self.trace
            );
            assert!(
                old == new || !is_used || changes.changed.contains(at),
                "seed {}: cluster {cluster} has changed, and nothing was said: {:#?}",
                self.seed,
                self.trace
            );
        }
    }
}
