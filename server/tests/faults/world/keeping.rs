//! What administrators and rules do with snapshots that are there: pins, plans, deletions, and the way back.

use std::sync::Arc;

use janus_proto::ids::SnapshotId;
use janus_server::{
    chain::Held,
    config::Settings,
    retention::{Retention, RetentionError},
    runs::RunError,
};
use tokio_util::sync::CancellationToken;

use super::{World, told};
use crate::promises::Promise;

impl World {
    /// Pins the oldest snapshot.
    pub fn pin_oldest(&mut self) -> Result<(), String> {
        self.until_done("pin", |world| {
            let Some(held) = world.oldest()? else { return Ok(()) };
            world.retention()?.pin(&held).map_err(why)?;
            world.promise(Promise::Pinned(held.snapshot().id));
            Ok(())
        })
    }

    /// Takes the pin of the oldest snapshot away.
    pub fn unpin_oldest(&mut self) -> Result<(), String> {
        self.until_done("unpin", |world| {
            let Some(held) = world.oldest()? else { return Ok(()) };
            world.promise(Promise::MayBeUnpinned(held.snapshot().id));
            world.retention()?.unpin(&held).map_err(|e| why(e.into()))
        })
    }

    /// Carries the plan out: two good runs stay, and what is pinned. Then purges what is due.
    pub fn thin(&mut self) -> Result<(), String> {
        let machine = self.machine.clone();
        self.until_done("carry out the plan", |world| {
            let retention = world.retention()?;
            let known = world.runs()?.machine(&machine).ok_or("the machine is unknown")?;
            let plan = retention.plan(&known).map_err(|e| why(e.into()))?;
            let drops: Vec<_> = plan.drops().map(|point| point.backup).collect();
            let going =
                known.snapshots().into_iter().filter(|held| drops.contains(&held.run.backup));
            let going: Vec<SnapshotId> = going.map(|held| held.snapshot().id).collect();
            going.iter().for_each(|id| world.promise(Promise::MayGo(*id)));
            retention.carry_out(&known, true).map_err(why)?;
            going.iter().for_each(|id| world.promise(Promise::Gone(*id)));
            Ok(())
        })?;
        self.purge_kept(false)
    }

    /// Deletes the oldest run; it can be brought back.
    pub fn delete_oldest(&mut self) -> Result<(), String> {
        let Some(held) = self.oldest()? else { return Ok(()) };
        self.delete(vec![held])
    }

    /// Deletes the newest run; it can be brought back.
    pub fn delete_newest(&mut self) -> Result<(), String> {
        let newest = self.there()?.into_iter().next();
        newest.map_or(Ok(()), |held| self.delete(vec![held]))
    }

    /// Deletes all runs of the machine.
    pub fn delete_all(&mut self) -> Result<(), String> {
        let all = self.there()?;
        self.delete(all)
    }

    fn delete(&mut self, all: Vec<Held>) -> Result<(), String> {
        let machine = self.machine.clone();
        all.iter().for_each(|held| self.promise(Promise::MayGo(held.snapshot().id)));
        self.until_done("delete", |world| {
            // Those of an attempt that failed in the middle are gone.
            let there = world.there()?.into_iter().map(|held| held.run.backup);
            let mut backups: Vec<_> =
                there.filter(|id| all.iter().any(|held| held.run.backup == *id)).collect();
            backups.dedup();
            world.retention()?.delete(&machine, &backups).map_err(why)
        })?;
        all.iter().for_each(|held| self.promise(Promise::Gone(held.snapshot().id)));
        Ok(())
    }

    /// Brings the newest run of the trash back: what was acknowledged of it holds again, and it has a pin.
    pub fn bring_back(&mut self) -> Result<(), String> {
        let machine = self.machine.clone();
        let Some(trashed) = self.runs()?.trashed(&machine).pop() else { return Ok(()) };
        let ids: Vec<_> = trashed.run.snapshots.iter().map(|snapshot| snapshot.id).collect();
        ids.iter().for_each(|id| self.promise(Promise::MayReturn(*id)));
        let pinned = self.until_done("bring a run back", |world| {
            match world.retention()?.restore(&machine, trashed.run.backup) {
                // An attempt that failed may have brought it back.
                Err(RetentionError::Run(RunError::Unknown { .. }))
                    if world.there()?.iter().any(|held| held.snapshot().id == ids[0]) =>
                {
                    Ok(ids[0])
                }
                restored => restored.map_err(why),
            }
        })?;
        ids.iter().for_each(|id| self.promise(Promise::IsBack(*id)));
        self.promise(Promise::Pinned(pinned));
        Ok(())
    }

    /// Purges what is due in the trash; with `all` also what could be brought back.
    pub fn purge_kept(&mut self, all: bool) -> Result<(), String> {
        let machine = self.machine.clone();
        self.until_done("purge", |world| {
            let report = world.retention()?.purge(&machine, all, &CancellationToken::new());
            world.check()?;
            report.waiting.first().map_or(Ok(()), |(_, wait)| Err(wait.to_string()))
        })
    }

    fn retention(&mut self) -> Result<Retention, String> {
        let mut settings = Settings::default();
        let rules = &mut settings.retention;
        (rules.keep_all_days, rules.daily, rules.weekly, rules.monthly) = (0, 0, 0, 0);
        rules.at_least = 2;
        settings.reserve = "0".into();
        self.runs()?;
        Ok(Retention::new(Arc::clone(self.runs.as_ref().unwrap()), settings))
    }

    /// All that is listed, newest first.
    pub(super) fn there(&mut self) -> Result<Vec<Held>, String> {
        let machine = self.machine.clone();
        let known = self.runs()?.machine(&machine);
        Ok(known.map(|known| known.snapshots()).unwrap_or_default())
    }

    fn oldest(&mut self) -> Result<Option<Held>, String> {
        Ok(self.there()?.pop())
    }
}

fn why(error: RetentionError) -> String {
    match error {
        RetentionError::Run(error) => told(error),
        error => error.to_string(),
    }
}
