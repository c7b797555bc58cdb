//! The store on a disk that fails: every operation of a scenario is where it is killed, where the power goes, or what fails.
//!
//! A scenario is a function over a [`World`], whose methods are the words it is made of: a disk, a backup, a restart. Around it:
//!
//! - `recorder` writes down every operation that goes through `storage`, or makes one of them fail;
//! - `shadow` is a file system in memory that knows what each crash leaves of the operations before it;
//! - `promises` is the model: what the client was told, and the bytes that a snapshot must have;
//! - `crashes` tries each kind of crash at every operation, `live` lets each operation fail while the server goes on.
//!
//! After each the store is opened, all acknowledged snapshots are compared bit by bit, and further backups are made. What is
//! tried is printed. `JANUS_SOAK=1` draws more of the mixtures that a power cut can leave.
//!
//! To add an operation of the store (a merge, a retention run, a move): give `World` a method that does it through
//! `until_done`, tell `promise` what it acknowledges (and `Promise::MayGo` before something may vanish), and write a
//! scenario with it below. Nothing else needs to know of it, as long as the operation uses `Store::storage` for its files.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod content;
mod crashes;
mod live;
mod promises;
mod recorder;
mod shadow;
mod sparse;
mod world;

use std::path::Path;

use janus_server::image::Format;
use world::World;

/// What a machine does.
type Scenario = fn(&mut World) -> Result<(), String>;

/// A base and a delta.
fn delta(world: &mut World) -> Result<(), String> {
    world.disk("root", (3 << 20) + 512);
    world.backup()?;
    world.change(1);
    world.backup()
}

/// Two disks in one run.
fn two_disks(world: &mut World) -> Result<(), String> {
    world.disk("root", 1 << 20);
    world.disk("data", (2 << 20) + 1024);
    world.backup()?;
    world.change(2);
    world.backup()
}

/// A disk that grows, then shrinks: new bases are made from the old heads.
fn resized(world: &mut World) -> Result<(), String> {
    world.disk("root", (2 << 20) + 512);
    world.backup()?;
    world.disk("root", (4 << 20) + 1536);
    world.backup()?;
    world.disk("root", (1 << 20) + 2048);
    world.change(3);
    world.backup()
}

/// A server that is restarted in mid-session, twice, and a run that is given up.
fn restarted(world: &mut World) -> Result<(), String> {
    world.disk("root", 4 << 20);
    world.send_some(4)?;
    world.restart()?;
    world.send_some(2)?;
    world.restart()?;
    world.backup()?;
    world.change(4);
    world.send_some(1)?;
    world.give_up()?;
    world.backup()
}

/// A base and a delta go out of a chain of four, and backups go on.
fn thinned(world: &mut World) -> Result<(), String> {
    world.disk("root", (1 << 20) + 512);
    world.backup()?;
    for seed in 5..8 {
        world.change(seed);
        world.backup()?;
    }
    world.drop_oldest(2)?;
    world.purge()?;
    world.change(8);
    world.backup()
}

/// A base of VHDs goes out of a chain.
fn vhds(world: &mut World) -> Result<(), String> {
    world.prefer(Format::Vhd);
    world.disk("root", (256 << 10) + 512);
    world.backup()?;
    world.change(5);
    world.backup()?;
    world.drop_oldest(1)?;
    world.purge()
}

#[test]
fn a_chain_of_vhds_survives_every_crash() {
    crashes::every("vhds", vhds);
}

#[test]
fn a_chain_of_vhds_survives_every_failure() {
    live::every("vhds", vhds);
}

/// Where files share blocks: a base goes into its two children, one of which is in the trash and comes back.
fn shared(world: &mut World) -> Result<(), String> {
    world.share_blocks();
    world.disk("root", (256 << 10) + 512);
    world.backup()?;
    world.overwrite(20, 30, 3);
    world.backup()?;
    world.delete_newest()?;
    world.overwrite(16, 40, 4);
    world.change(5);
    world.backup()?;
    world.drop_oldest(1)?;
    world.purge_kept(false)?;
    world.bring_back()
}

#[test]
fn merges_that_share_blocks_survive_every_crash() {
    crashes::every("shared", shared);
}

#[test]
fn merges_that_share_blocks_survive_every_failure() {
    live::every("shared", shared);
}

/// A store that is moved.
fn moved(world: &mut World) -> Result<(), String> {
    world.disk("root", (64 << 10) + 512);
    world.backup()?;
    world.relocate()
}

#[test]
fn a_moved_store_survives_every_crash() {
    crashes::every("moved", moved);
}

#[test]
fn a_moved_store_survives_every_failure() {
    live::every("moved", moved);
}

/// A store that is rebuilt while a run was open, and backups that go on.
fn rebuilt(world: &mut World) -> Result<(), String> {
    world.disk("root", (1 << 20) + 512);
    world.backup()?;
    world.change(9);
    world.backup()?;
    world.change(10);
    world.send_some(2)?;
    world.walk_away();
    world.rebuild()?;
    world.change(11);
    world.backup()
}

#[test]
fn a_rebuilt_store_survives_every_crash() {
    crashes::every("rebuilt", rebuilt);
}

#[test]
fn a_rebuilt_store_survives_every_failure() {
    live::every("rebuilt", rebuilt);
}

/// A plan is carried out around a pin, and again without it.
fn planned(world: &mut World) -> Result<(), String> {
    world.disk("root", (256 << 10) + 512);
    world.backup()?;
    for seed in 5..8 {
        world.change(seed);
        world.backup()?;
    }
    world.pin_oldest()?;
    world.thin()?;
    world.unpin_oldest()?;
    world.thin()?;
    world.change(8);
    world.backup()
}

/// A run is deleted and brought back; then the whole machine goes, and backups begin anew.
fn deleted(world: &mut World) -> Result<(), String> {
    world.disk("root", (256 << 10) + 512);
    world.backup()?;
    world.change(5);
    world.backup()?;
    world.delete_oldest()?;
    world.bring_back()?;
    world.unpin_oldest()?;
    world.delete_all()?;
    world.purge_kept(true)?;
    world.change(6);
    world.backup()
}

/// A block of the base is damaged, a check finds it, and the next run brings it.
fn healed(world: &mut World) -> Result<(), String> {
    world.disk("root", (256 << 10) + 512);
    world.backup()?;
    world.change(5);
    world.backup()?;
    world.damage("root", 10)?;
    world.verify()?;
    if world.promised().hides_damage() {
        return Err("the check has found nothing".into());
    }
    world.change(6);
    world.backup()?;
    world.verify()
}

/// An import that is stopped and gone on with, and one that continues the chain.
fn imported(world: &mut World) -> Result<(), String> {
    world.disk("root", (1 << 20) + 512);
    world.disk("data", 256 << 10);
    world.import_some()?;
    world.restart()?;
    world.import()?;
    world.change(5);
    world.backup()?;
    world.change(6);
    world.import()
}

/// An import that is stopped, and gone on with as one of a newer run.
fn renewed(world: &mut World) -> Result<(), String> {
    world.disk("root", (64 << 10) + 512);
    world.import_some()?;
    world.restart()?;
    world.change(4);
    world.forget_carried();
    world.import()
}

/// Stubs that a backup completes, and that are full then.
fn stubbed(world: &mut World) -> Result<(), String> {
    world.disk("root", (256 << 10) + 512);
    world.import_stubs()?;
    world.fill()?;
    world.backup()?;
    world.fill_up()?;
    world.change(5);
    world.backup()
}

/// A stub that is never full goes, since what builds on it has all of its own.
fn replaced(world: &mut World) -> Result<(), String> {
    world.disk("root", (256 << 10) + 512);
    world.import_stubs()?;
    world.fill()?;
    world.change(5);
    world.backup()?;
    world.fill()?;
    world.drop_oldest(1)?;
    world.purge()?;
    world.has_no_stubs()?;
    world.change(6);
    world.backup()
}

#[test]
fn stubs_survive_every_crash() {
    crashes::every("stubbed", stubbed);
    crashes::every("replaced", replaced);
}

#[test]
fn stubs_survive_every_failure() {
    live::every("stubbed", stubbed);
    live::every("replaced", replaced);
}

#[test]
fn an_import_survives_every_crash() {
    crashes::every("imported", imported);
    crashes::every("renewed", renewed);
}

#[test]
fn an_import_survives_every_failure() {
    live::every("imported", imported);
    live::every("renewed", renewed);
}

#[test]
fn a_plan_survives_every_crash() {
    crashes::every("planned", planned);
}

#[test]
fn a_plan_survives_every_failure() {
    live::every("planned", planned);
}

#[test]
fn deletions_survive_every_crash() {
    crashes::every("deleted", deleted);
}

#[test]
fn deletions_survive_every_failure() {
    live::every("deleted", deleted);
}

#[test]
fn damage_is_healed_after_every_crash() {
    crashes::every("healed", healed);
}

#[test]
fn damage_is_healed_after_every_failure() {
    live::every("healed", healed);
}

#[test]
fn a_thinned_chain_survives_every_crash() {
    crashes::every("thinned", thinned);
}

#[test]
fn a_thinned_chain_survives_every_failure() {
    live::every("thinned", thinned);
}

#[test]
fn a_delta_survives_every_crash() {
    crashes::every("delta", delta);
}

#[test]
fn a_delta_survives_every_failure() {
    live::every("delta", delta);
}

#[test]
fn two_disks_survive_every_crash() {
    crashes::every("two disks", two_disks);
}

#[test]
fn two_disks_survive_every_failure() {
    live::every("two disks", two_disks);
}

#[test]
fn resized_disks_survive_every_crash() {
    crashes::every("resized", resized);
}

#[test]
fn resized_disks_survive_every_failure() {
    live::every("resized", resized);
}

#[test]
fn a_restarted_server_survives_every_crash() {
    crashes::every("restarted", restarted);
}

#[test]
fn a_restarted_server_survives_every_failure() {
    live::every("restarted", restarted);
}

/// A folder in memory where there is one: nothing here needs a real disk.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let mut named = tempfile::Builder::new();
    named.prefix("janus-faults-");
    match memory.is_dir() {
        true => named.tempdir_in(memory),
        false => named.tempdir(),
    }
    .unwrap()
}

/// How often something drawn is drawn.
fn rounds(usually: u64, in_soak: u64) -> u64 {
    if std::env::var_os("JANUS_SOAK").is_some() { in_soak } else { usually }
}
