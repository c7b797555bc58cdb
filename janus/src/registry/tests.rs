use janus_proto::pb::report_request::Event;

use super::*;

fn id(name: &str) -> ServerId {
    name.parse().unwrap()
}

fn key(name: &str) -> MachineKey {
    name.parse().unwrap()
}

fn hello(generation: &str, start_epoch: u64) -> pb::ReportHello {
    pb::ReportHello { store_generation: generation.into(), start_epoch, ..Default::default() }
}

fn machine(name: &str, use_counter: u64, has_chain: bool) -> pb::StateChange {
    let machines = vec![pb::MachineReport {
        machine: name.into(),
        use_counter,
        has_chain,
        ..Default::default()
    }];
    pb::StateChange { machines, ..Default::default() }
}

fn snapshot(id: SnapshotId, machine: &str) -> pb::StateChange {
    let snapshot =
        pb::Snapshot { snapshot_id: id.to_string(), machine: machine.into(), ..Default::default() };
    pb::StateChange { snapshots: vec![snapshot], ..Default::default() }
}

fn known(registry: &Registry, name: &str, server: &str) -> Known {
    registry.known(Some(&key(name)), &[Some(id(server))])[0]
}

#[tokio::test]
async fn a_start_on_its_way_counts_at_once_and_not_at_all_when_it_fails() {
    let registry = Registry::new();
    let claim = registry.claim(&key("u/m"), &id("a"), 0);
    assert_eq!(
        known(&registry, "u/m", "a"),
        Known {
            use_counter: 1,
            has_chain: true,
            last_starts: 1,
            initial_runs: 1,
            is_seeded: false
        }
    );
    drop(claim);
    assert_eq!(known(&registry, "u/m", "a"), Known::default());

    registry.claim(&key("u/m"), &id("a"), 0).accept(5);
    let after = known(&registry, "u/m", "a");
    assert_eq!((after.use_counter, after.has_chain), (5, true));
    assert_eq!(registry.claim(&key("u/m"), &id("b"), 0).counter(), 6);
    assert_eq!(registry.claim(&key("u/m"), &id("b"), 9).counter(), 9, "the client knows more");
}

#[tokio::test]
async fn counters_merge_by_maximum_and_chains_as_the_server_says() {
    let registry = Registry::new();
    registry.claim(&key("u/m"), &id("a"), 0).accept(5);
    let slot = registry.open_report(&id("a"), &hello("g", 1)).unwrap();
    slot.take(1, Some(Event::Full(machine("u/m", 4, false)))).unwrap();
    assert_eq!(known(&registry, "u/m", "a").use_counter, 5);
    assert!(known(&registry, "u/m", "a").has_chain, "the report is older than the start");
    slot.take(2, Some(Event::Change(machine("u/m", 5, false)))).unwrap();
    assert!(!known(&registry, "u/m", "a").has_chain);
    slot.take(3, Some(Event::Change(machine("u/m", 5, true)))).unwrap();
    assert!(known(&registry, "u/m", "a").has_chain);
}

#[tokio::test]
async fn a_full_state_replaces_the_old_one_when_it_is_complete() {
    let registry = Registry::new();
    let (old, new) = (SnapshotId::new(), SnapshotId::new());
    let first = registry.open_report(&id("a"), &hello("g1", 7)).unwrap();
    first.take(1, Some(Event::Full(snapshot(old, "u/m")))).unwrap();
    first.take(2, Some(Event::Full(machine("u/m", 3, true)))).unwrap();
    first.take(3, Some(Event::FullEnd(pb::FullEnd {}))).unwrap();

    let second = registry.open_report(&id("a"), &hello("g2", 1)).unwrap();
    assert!(matches!(first.take(4, None), Err(ReportRefused::Superseded { .. })));
    second.take(1, Some(Event::Full(snapshot(new, "u/m")))).unwrap();
    assert!(registry.snapshot(old).is_some(), "not yet");
    second.take(2, Some(Event::FullEnd(pb::FullEnd {}))).unwrap();
    assert!(registry.snapshot(old).is_none() && registry.snapshot(new).is_some());
    assert_eq!(known(&registry, "u/m", "a").use_counter, 3, "counters survive a new store");
    assert!(!known(&registry, "u/m", "a").has_chain, "chains don't");

    drop(first);
    assert!(registry.report_age(&id("a")).is_some(), "the older stream's end changes nothing");
    drop(second);
    assert!(registry.report_age(&id("a")).is_none());
    assert!(registry.snapshot(new).is_some(), "the state outlives its stream");
}

#[tokio::test]
async fn a_broken_full_state_leaves_the_old_one() {
    let registry = Registry::new();
    let (old, new) = (SnapshotId::new(), SnapshotId::new());
    let first = registry.open_report(&id("a"), &hello("g", 1)).unwrap();
    first.take(1, Some(Event::Full(snapshot(old, "u/m")))).unwrap();
    first.take(2, Some(Event::FullEnd(pb::FullEnd {}))).unwrap();
    let second = registry.open_report(&id("a"), &hello("g", 2)).unwrap();
    second.take(1, Some(Event::Full(snapshot(new, "u/m")))).unwrap();
    drop(second);
    assert!(registry.snapshot(old).is_some() && registry.snapshot(new).is_none());
    let late = registry.open_report(&id("a"), &hello("g", 1));
    assert!(matches!(late, Err(ReportRefused::OldEpoch { known: 2, epoch: 1, .. })));
}

#[tokio::test]
async fn an_older_stream_of_the_same_process_that_comes_late_is_refused() {
    let registry = Registry::new();
    let stream = |epoch, stream| pb::ReportHello { stream, ..hello("g", epoch) };
    let second = registry.open_report(&id("a"), &stream(1, 2)).unwrap();
    let late = registry.open_report(&id("a"), &stream(1, 1));
    assert!(matches!(late, Err(ReportRefused::Superseded { .. })));
    second.take(1, Some(Event::Change(machine("u/m", 1, true)))).unwrap();
    drop(second);
    let late = registry.open_report(&id("a"), &stream(1, 1));
    assert!(matches!(late, Err(ReportRefused::Superseded { .. })), "also when the newer has ended");
    let third = registry.open_report(&id("a"), &stream(1, 3)).unwrap();
    let of_an_older_program = registry.open_report(&id("a"), &stream(1, 0)).unwrap();
    assert!(matches!(third.take(1, None), Err(ReportRefused::Superseded { .. })));
    drop(of_an_older_program);
    registry.open_report(&id("a"), &stream(2, 1)).expect("a new process counts from 1");
}

#[tokio::test]
async fn removed_snapshots_go_and_seals_are_not_kept() {
    let registry = Registry::new();
    let id_ = SnapshotId::new();
    let slot = registry.open_report(&id("a"), &hello("g", 1)).unwrap();
    slot.take(1, Some(Event::FullEnd(pb::FullEnd {}))).unwrap();
    let mut change = snapshot(id_, "u/m");
    change.snapshots[0].client_seal = bytes::Bytes::from_static(&[1; 4096]);
    slot.take(2, Some(Event::Change(change))).unwrap();
    assert_eq!(registry.snapshot(id_).unwrap().1.client_seal.len(), 0);
    let removed_snapshots = vec![id_.to_string()];
    slot.take(3, Some(Event::Change(pb::StateChange { removed_snapshots, ..Default::default() })))
        .unwrap();
    assert!(registry.snapshot(id_).is_none());
}

#[tokio::test]
async fn first_backups_under_way_are_counted() {
    let registry = Registry::new();
    let run = BackupId::new();
    let call = registry.run_call(run, &id("a"), Some(&key("u/m")));
    assert_eq!(known(&registry, "u/other", "a").initial_runs, 1);
    assert_eq!(registry.server_of_run(run), Some(id("a")));
    let slot = registry.open_report(&id("a"), &hello("g", 1)).unwrap();
    slot.take(1, Some(Event::Change(machine("u/m", 1, true)))).unwrap();
    assert_eq!(known(&registry, "u/other", "a").initial_runs, 0, "it has a chain now");
    drop(call);
}

#[tokio::test(start_paused = true)]
async fn two_servers_of_one_name_are_told_of_as_long_as_both_are_heard() {
    let registry = Registry::new();
    let _real = registry.open_report(&id("a"), &hello("real", 1)).unwrap();
    let _other = registry.open_report(&id("a"), &hello("other", 1)).unwrap();
    tokio::time::advance(RIVAL_KEPT / 2).await;
    assert_eq!(registry.warnings().len(), 1);
    let _real = registry.open_report(&id("a"), &hello("real", 2)).unwrap();
    tokio::time::advance(RIVAL_KEPT / 2).await;
    assert_eq!(registry.warnings().len(), 1);
    // The other one never came back.
    tokio::time::advance(RIVAL_KEPT / 2).await;
    assert_eq!(registry.warnings(), Vec::<String>::new());
}

#[tokio::test]
async fn machines_that_a_server_is_seeded_with_are_those_it_named_last() {
    let registry = Registry::new();
    let seeding = |names: &[&str]| {
        let seeding = names.iter().map(|name| (*name).to_owned()).collect();
        Some(pb::Vitals { seeding, ..Default::default() })
    };
    let mut hello = hello("g", 1);
    hello.vitals = seeding(&["u/*", "nonsense"]);
    let slot = registry.open_report(&id("a"), &hello).unwrap();
    let is_seeded = |name: &str, server: &str| known(&registry, name, server).is_seeded;
    assert!(is_seeded("u/m", "a") && !is_seeded("v/m", "a") && !is_seeded("u/m", "b"));
    let heartbeat = pb::Heartbeat { vitals: seeding(&["v/m/disk"]) };
    slot.take(2, Some(Event::Heartbeat(heartbeat))).unwrap();
    assert!(!is_seeded("u/m", "a") && is_seeded("v/m", "a"));
}

#[tokio::test]
async fn a_part_of_a_list_of_groups_is_gone_with_its_stream() {
    let registry = Registry::new();
    let list = |member: &str, more| {
        let members = vec![member.to_owned()];
        let grant = pb::Grant { members, restore: vec!["u/*".into()], ..Default::default() };
        Some(Event::Grants(pb::Grants { grants: vec![grant], more, ..Default::default() }))
    };
    let first = registry.open_report(&id("a"), &hello("g", 1)).unwrap();
    first.take(1, list("carol", true)).unwrap();
    drop(first);
    let second = registry.open_report(&id("a"), &hello("g", 1)).unwrap();
    second.take(1, list("dave", false)).unwrap();
    let sees = |user: &str| {
        let role = janus_proto::tls::Role::User(user.into());
        registry.sight_of(&role).sees(&key("u/m"))
    };
    assert!(sees("dave") && !sees("carol"));
}

#[tokio::test]
async fn the_newest_backup_of_each_machine_is_known_whatever_a_server_holds() {
    let registry = Registry::new();
    let slot = registry.open_report(&id("a"), &hello("g", 1)).unwrap();
    let of = |machine: &str, committed_ms| {
        let mut change = snapshot(SnapshotId::new(), machine);
        change.snapshots[0].committed_ms = committed_ms;
        change
    };
    for number in 0..snapshots::MAX_SNAPSHOTS as i64 {
        slot.take(1, Some(Event::Full(of("u/many", number)))).unwrap();
    }
    slot.take(1, Some(Event::Full(of("u/late", 5)))).unwrap();
    slot.take(2, Some(Event::FullEnd(pb::FullEnd {}))).unwrap();
    slot.take(3, Some(Event::Change(of("u/many", i64::MAX)))).unwrap();
    let last = |machine: &str| registry.last_backups()[&(machine.to_owned(), id("a"))];
    assert_eq!((last("u/late"), last("u/many")), (5, i64::MAX));
    assert_eq!(registry.snapshot_ids(&id("a")).len(), snapshots::MAX_SNAPSHOTS);
}

#[tokio::test]
async fn a_machine_is_unfinished_while_all_its_servers_say_so_since_its_first_start() {
    let registry = Registry::new();
    let never = |name: &str, never_committed| {
        let mut change = machine(name, 4, false);
        change.machines[0].never_committed = never_committed;
        Some(Event::Change(change))
    };
    let a = registry.open_report(&id("a"), &hello("g", 1)).unwrap();
    let b = registry.open_report(&id("b"), &hello("h", 1)).unwrap();
    a.take(1, never("u/m", true)).unwrap();
    a.take(1, never("u/n", true)).unwrap();
    b.take(1, never("u/n", false)).unwrap();
    let since: Vec<_> = registry.unfinished().into_iter().collect();
    assert!(since.len() == 1 && since[0].0 == key("u/m") && since[0].1 > 0, "{since:?}");

    let later = Registry::new();
    let mut remembered = registry.remembered();
    remembered[0].unfinished.insert("u/m".into(), 7);
    later.recall(remembered);
    assert_eq!(later.unfinished().into_iter().collect::<Vec<_>>(), [(key("u/m"), 7)]);
    a.take(2, never("u/m", false)).unwrap();
    assert!(registry.unfinished().is_empty());
}
