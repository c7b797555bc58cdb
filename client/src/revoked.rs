//! Servers and janus that aren't believed any more, as far as this client has heard.
//!
//! Nobody reports to a client, so each backup asks all URLs beside its work: one that was stolen tells nothing, the others do. What
//! was heard is signed by servers of the group and kept in the cache folder; it counts from the next connection on.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use janus_proto::{
    channel::{self, ConnectOptions, Dialer, Expect},
    pb::{self, GetServerInfoRequest, server_info_service_client::ServerInfoServiceClient},
    revoked::{Kept, Revocation},
    storage::Disk,
    tls::Identity,
};
use tokio::time::timeout;
use tonic::Request;

const FILE: &str = "revoked.json";
/// A file that is larger was not written by us.
const MAX_BYTES: u64 = 8 << 20;
/// For one URL.
const ANSWER: Duration = Duration::from_secs(3);

/// Believes again what `folder` keeps. Reads a file: one that can't be used is as good as none.
pub fn recall(identity: &Identity, folder: &Path) {
    let path = folder.join(FILE);
    let is_ours = fs::metadata(&path).is_ok_and(|file| file.len() <= MAX_BYTES);
    let text = if is_ours { fs::read(&path).unwrap_or_default() } else { Vec::new() };
    let Ok(kept) = serde_json::from_slice::<Kept>(&text) else { return };
    // Signed as they are, they are looked at again: whoever may write that file can't lock anybody out.
    let told: Vec<_> = kept.into_revocations().iter().map(Revocation::to_wire).collect();
    take(identity, &told);
}

/// Asks all URLs for news, and takes each answer in as it comes.
pub async fn learn(urls: Vec<String>, dialer: Dialer, identity: Identity, folder: PathBuf) {
    let asking = urls.into_iter().map(|url| timeout(ANSWER, ask(url, dialer.clone())));
    let mut asking: FuturesUnordered<_> = asking.collect();
    while let Some(answer) = asking.next().await {
        let told = answer.ok().flatten().unwrap_or_default();
        if told.is_empty() {
            continue;
        }
        let (identity, folder) = (identity.clone(), folder.clone());
        let taking = tokio::task::spawn_blocking(move || take_and_keep(&identity, &folder, &told));
        if let Err(error) = taking.await {
            tracing::error!(%error, "what was revoked isn't taken in");
        }
    }
}

/// Blocks.
fn take_and_keep(identity: &Identity, folder: &Path, told: &[pb::Revocation]) {
    let news = take(identity, told);
    if news == 0 {
        return;
    }
    tracing::warn!(
        news,
        "certificates of servers or janus were revoked: they aren't believed from now on"
    );
    let kept = Kept::of(&identity.revocations().all());
    let text = serde_json::to_vec_pretty(&kept).unwrap_or_default();
    if let Err(error) = Disk::default().replace(&folder.join(FILE), &text) {
        tracing::warn!(%error, "what was revoked isn't remembered");
    }
}

/// Blocks: signatures are checked.
fn take(identity: &Identity, told: &[pb::Revocation]) -> usize {
    let news = identity.news(told, |error| tracing::debug!(%error, "revocation ignored"));
    let count = news.len();
    let _ = identity.revocations().insert(news);
    count
}

async fn ask(url: String, dialer: Dialer) -> Option<Vec<pb::Revocation>> {
    let options = ConnectOptions::expecting(Expect::ServerOrJanus);
    let connection = channel::connect_through(&url, dialer, options).await.ok()?;
    let mut request = Request::new(GetServerInfoRequest {});
    request.set_timeout(ANSWER);
    let info = ServerInfoServiceClient::new(connection.channel).get_server_info(request).await;
    Some(info.ok()?.into_inner().revocations)
}
