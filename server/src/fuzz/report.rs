//! Reports of servers, as janus takes them in: what one server says, in whatever order, changes nothing of the others.

use janus::registry::{Registry, Sight};
use janus_proto::{
    ids::{MachineKey, ServerId, SnapshotId},
    pb::{self, report_request::Event},
    tls::{Limits, Principal, Role},
};
use prost::Message;

/// Messages of one input that are looked at.
const MOST: usize = 256;

/// Length-delimited messages of one server.
pub fn fuzz_report(mut bytes: &[u8]) {
    let (Ok(server), Ok(other)) = ("fuzzed".parse::<ServerId>(), "other".parse::<ServerId>())
    else {
        return;
    };
    let (registry, user) = (Registry::new(), principal(Role::User("alice".into())));
    let Ok(machine) = "alice/web1".parse::<MachineKey>() else { return };
    let Ok(slot) = registry.open_report(&other, &pb::ReportHello::default()) else { return };
    for (sequence, event) in valid(1).into_iter().enumerate().skip(1) {
        let _ = slot.take(sequence as u64, event.event);
    }
    let mut slots = vec![slot];
    let of_other = registry.snapshots(&other, None, None);
    let counters = registry.uses(&other);
    for _ in 0..MOST {
        let Ok(message) = pb::ReportRequest::decode_length_delimited(&mut bytes) else { break };
        match message.event {
            Some(Event::Hello(hello)) => {
                slots.extend(registry.open_report(&server, &hello));
                // Older ones are out; as many as a janus would hold.
                let excess = slots.len().saturating_sub(4);
                slots.drain(1..=excess);
            }
            // The first is the other server's: nothing of this one gets there.
            event => drop(slots[1..].last().map(|slot| slot.take(message.sequence, event))),
        }
    }
    let sight = registry.sight(&user);
    assert!(sight.sees(&machine) && !sight.is_all());
    for sight in [sight, Sight::all()] {
        let _ = (registry.damaged(&server, &sight), registry.incomplete(&server, &sight));
        let _ = (registry.proofs(&server, &sight), registry.alarms(&server, &sight));
    }
    let _ = (registry.warnings(), registry.last_backups(), registry.policies());
    let known = registry.remembered();
    let again = Registry::new();
    again.recall(known);
    assert_eq!(registry.snapshots(&other, None, None), of_other, "of another server");
    assert_eq!(registry.uses(&other), counters, "of another server");
}

fn principal(role: Role) -> Principal {
    Principal::new("fuzz", role, Limits::default(), bytes::Bytes::new())
}

/// A report as servers make it.
fn valid(use_counter: u64) -> Vec<pb::ReportRequest> {
    let machine = || "alice/web1".to_owned();
    let state = || pb::StateChange {
        machines: vec![pb::MachineReport {
            machine: machine(),
            use_counter,
            has_chain: true,
            never_committed: false,
            proof: Some(pb::Proof { proven_ms: 1, ..Default::default() }),
            alarm: "changed".into(),
        }],
        snapshots: vec![pb::Snapshot {
            snapshot_id: SnapshotId::new().to_string(),
            machine: machine(),
            disk_id: "sda".into(),
            committed_ms: 1,
            size_bytes: 512,
            damaged_blocks: 1,
            missing_blocks: 1,
            ..Default::default()
        }],
        removed_snapshots: vec![SnapshotId::new().to_string()],
    };
    let grant = pb::Grant {
        members: vec!["alice".into(), machine()],
        backup: vec!["bob/*".into()],
        restore: vec!["*".into(), "bob/db".into()],
    };
    let hello = pb::ReportHello {
        store_generation: "generation".into(),
        start_epoch: 1,
        urls: vec!["https://server:7421".into()],
        settings: Some(pb::SharedSettings::default()),
        vitals: Some(pb::Vitals { warnings: vec!["a warning".into()], ..Default::default() }),
        stream: 1,
        ..Default::default()
    };
    let grants = |more| pb::Grants { grants: vec![grant.clone()], more, ..Default::default() };
    let events = [
        Event::Hello(hello),
        Event::Full(state()),
        Event::FullEnd(pb::FullEnd {}),
        Event::Grants(grants(true)),
        Event::Grants(grants(false)),
        Event::Change(state()),
        Event::Heartbeat(pb::Heartbeat { vitals: Some(pb::Vitals::default()) }),
    ];
    let numbered = events.into_iter().zip(1..);
    numbered.map(|(event, sequence)| pb::ReportRequest { sequence, event: Some(event) }).collect()
}

/// A whole report, and two of them one after the other.
pub(super) fn report_seeds() -> Vec<Vec<u8>> {
    let encoded = |use_counter| {
        let messages = valid(use_counter);
        messages.iter().flat_map(Message::encode_length_delimited_to_vec).collect::<Vec<u8>>()
    };
    vec![encoded(2), [encoded(3), encoded(2)].concat()]
}
