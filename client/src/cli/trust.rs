//! `janus-client trust-journal`.

use clap::ArgMatches;
use serde_json::json;

use super::{Context, Failure, Outcome};
use crate::{cache::DiskCache, frozen::Snapshots, source::Source};

/// Forgets that a journal was wrong: the next backup compares everything, and the ones after it ask the journal again.
pub(super) async fn run(matches: &ArgMatches, context: &Context) -> Result<Outcome, Failure> {
    let disk = matches.get_one::<String>("disk").cloned().unwrap_or_default();
    let specs = context.settings.disk_specs()?;
    let folder = context.settings.cache_path.clone();
    let forgetting = tokio::task::spawn_blocking(move || {
        // Nothing is read of it.
        let sources = Source::open_all(&specs, &Snapshots::default(), |_| true)?;
        let named = sources.into_iter().find(|source| source.disk_id().as_str() == disk);
        let unknown = || Failure::usage(format!("the settings name no disk with the id {disk:?}"));
        let source = named.ok_or_else(unknown)?;
        DiskCache::open(&folder, source.disk_id(), source.size_bytes())?.forget_cursor()?;
        Ok::<_, Failure>(disk)
    });
    let disk = forgetting.await.map_err(Failure::failed)??;
    let text = format!(
        "{disk}: the next backup compares everything, later ones ask its change journals again\n"
    );
    Ok(Outcome { json: json!({ "ok": true, "disk_id": disk }), text })
}
