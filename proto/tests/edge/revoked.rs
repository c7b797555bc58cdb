//! Revocations: who may make them, how they merge, and what ends.

use std::time::Duration;

use janus_proto::{
    channel::{ConnectOptions, Dial, Target},
    listener::Limits,
    revoked::{Kept, RevocationRefused, Revocations},
};
use tokio::{io::AsyncReadExt, time::timeout};

use super::{foreign_call, pki::Ca, refused, start};

const WEB1: &str = "janus://g/client/alice/web1";

#[tokio::test]
async fn only_servers_of_the_group_revoke_and_not_far_ahead() {
    let (ca, other) = (Ca::new(), Ca::new());
    let judge = ca.identity("g/janus/j", "127.0.0.1");
    let server = ca.identity("g/server/a", "127.0.0.1");
    let good = server.revoke(WEB1.into()).unwrap().to_wire();
    assert_eq!(judge.believed(&good).unwrap().to_wire(), good);
    let stranger = other.identity("g/server/a", "127.0.0.1");
    for signer in [
        ca.identity("g/janus/j", "127.0.0.1"),
        ca.identity("g/operator/o", "unused"),
        ca.identity("g/client/alice/web2", "unused"),
        ca.identity("h/server/a", "127.0.0.1"),
        stranger,
    ] {
        let forged = signer.revoke(WEB1.into()).unwrap().to_wire();
        let why = judge.believed(&forged).unwrap_err();
        println!("{why}");
        assert!(matches!(why, RevocationRefused::Signer { .. }), "{why}");
    }
    let mut changed = vec![good.clone(); 5];
    changed[0].principal = "janus://g/client/alice/web2".into();
    changed[1].until_seconds += 1;
    changed[2].signature = vec![0; 70].into();
    changed[3].scheme = 0x0804;
    changed[4].signer = vec![1; 700].into();
    for one in changed {
        assert!(matches!(judge.believed(&one), Err(RevocationRefused::Signer { .. })), "{one:?}");
    }
    let mut ahead = good.clone();
    ahead.until_seconds += 100_000;
    assert!(matches!(judge.believed(&ahead), Err(RevocationRefused::Ahead(_))));
    let mut long = vec![good.clone(); 3];
    long[0].principal = format!("janus://{}", "x".repeat(1000));
    long[1].signer = vec![0; 10_000].into();
    long[2].scheme = 1 << 20;
    for one in long {
        assert!(matches!(judge.believed(&one), Err(RevocationRefused::Form(_))), "{one:?}");
    }
    // One who is revoked revokes nobody any more.
    judge.revocations().insert([server.revoke("janus://g/server/a".into()).unwrap()]).unwrap();
    judge.believed(&good).unwrap_err();
}

#[tokio::test]
async fn the_later_of_two_counts_in_whatever_order_they_come() {
    let ca = Ca::new();
    let server = ca.identity("g/server/a", "127.0.0.1");
    let early = server.revoke(WEB1.into()).unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let late = server.revoke(WEB1.into()).unwrap();
    let other = server.revoke("janus://g/operator/o".into()).unwrap();
    assert!(early.until < late.until);
    let of = |order: &[&janus_proto::revoked::Revocation]| {
        let known = Revocations::default();
        for one in order {
            known.insert([(*one).clone()]).unwrap();
        }
        (known.digest(), known.all())
    };
    let whole = of(&[&early, &late, &other]);
    assert_eq!(whole.1.len(), 2);
    assert_eq!(of(&[&other, &late, &early, &late]), whole);
    assert_ne!(of(&[&early, &other]).0, whole.0);
    let known = Revocations::default();
    let mut changes = known.changes();
    known.insert([late.clone()]).unwrap();
    assert!(changes.has_changed().unwrap());
    changes.mark_unchanged();
    known.insert([early, late]).unwrap();
    assert!(!changes.has_changed().unwrap());
}

#[tokio::test]
async fn they_are_kept_and_one_server_leaves_places_to_the_others() {
    let ca = Ca::new();
    let (a, b) = (ca.identity("g/server/a", "127.0.0.1"), ca.identity("g/server/b", "127.0.0.1"));
    let one = a.revoke("janus://g/client/u/0".into()).unwrap();
    let many: Vec<_> = (0..60_000)
        .map(|number| {
            let mut one = one.clone();
            one.principal = format!("janus://g/client/u/{number}");
            one
        })
        .collect();
    let known = Revocations::default();
    assert!(matches!(known.insert(many), Err(RevocationRefused::TooMany)));
    assert_eq!(known.all().len(), 50_000);
    known.insert([b.revoke(WEB1.into()).unwrap()]).unwrap();
    let all = known.all();
    let text = serde_json::to_string_pretty(&Kept::of(&all)).unwrap();
    println!("{} bytes for {} revocations", text.len(), all.len());
    assert!(text.len() < 400 * all.len());
    let kept: Kept = serde_json::from_str(&text).unwrap();
    assert_eq!(kept.into_revocations(), all);
    let hostile = text.replace("\"signer\": 0,", "\"signer\": 7,");
    let kept: Kept = serde_json::from_str(&hostile).unwrap();
    assert_eq!(kept.into_revocations().len(), all.len() - 1);
}

#[tokio::test]
async fn what_a_server_had_signed_is_signed_anew_once_it_is_believed_no_more() {
    let ca = Ca::new();
    let [a, b, c] = ["a", "b", "c"].map(|n| ca.identity(&format!("g/server/{n}"), "127.0.0.1"));
    let judge = ca.identity("g/janus/j", "127.0.0.1");
    let of_a = a.revoke(WEB1.into()).unwrap().to_wire();
    for knows in [&b, &judge] {
        knows.revocations().insert(knows.news(std::slice::from_ref(&of_a), |_| panic!())).unwrap();
    }
    assert!(b.signed_anew().is_empty());
    let gone = b.revoke("janus://g/server/a".into()).unwrap();
    for knows in [&b, &c, &judge] {
        knows.revocations().insert([gone.clone()]).unwrap();
    }
    let ignored = std::cell::Cell::new(0);
    let count = |_: &RevocationRefused| ignored.set(ignored.get() + 1);
    assert!(c.news(&[of_a], count).is_empty() && ignored.get() == 1);
    let anew = b.signed_anew();
    assert_eq!(anew.len(), 1);
    let before = b.revocations().digest();
    b.revocations().insert(anew).unwrap();
    assert!(b.signed_anew().is_empty() && b.revocations().digest() == before);
    let told = b.revocations().messages().concat();
    for knows in [&c, &judge] {
        let news = knows.news(&told, |error| panic!("{error}"));
        knows.revocations().insert(news).unwrap();
        assert_eq!(knows.revocations().digest(), before);
        assert!(knows.news(&told, |_| panic!()).is_empty());
        assert!(knows.signed_anew().is_empty());
    }
}

#[tokio::test]
async fn nobody_is_locked_out_for_longer_than_clocks_may_differ() {
    let ca = Ca::new();
    let (judge, server) =
        (ca.identity("g/janus/j", "127.0.0.1"), ca.identity("g/server/a", "127.0.0.1"));
    let web1 = ca.identity("g/client/alice/web1", "unused");
    let wire = server.revoke(WEB1.into()).unwrap().to_wire();
    judge.revocations().insert([judge.believed(&wire).unwrap()]).unwrap();
    let refused = judge.revocations().refuses(web1.principal()).unwrap();
    assert_eq!(refused, wire.until_seconds);
    // As far ahead as is believed at all. It can't be signed here: what counts is when it was heard of.
    let kept = serde_json::to_value(Kept::of(&judge.revocations().all())).unwrap();
    let mut kept = kept.clone();
    kept["revocations"][0]["until"] = (wire.until_seconds + 80_000).into();
    let kept: Kept = serde_json::from_value(kept).unwrap();
    let later = Revocations::default();
    later.insert(kept.into_revocations()).unwrap();
    let refused = later.refuses(web1.principal()).unwrap();
    assert!(refused <= wire.until_seconds + 3602, "{refused}");
}

#[tokio::test]
async fn open_connections_end_at_either_side_and_new_ones_are_refused() {
    let ca = Ca::new();
    let at = ca.identity("g/server/a", "127.0.0.1");
    let server = start(at.clone(), Limits::default()).await;
    let client = ca.identity("g/client/alice/web1", "unused");
    let bystander = ca.identity("g/client/alice/web2", "unused");
    let target: Target = server.url().parse().unwrap();
    let options = ConnectOptions::default();
    let (mut held, _) = client.dial(&target, &options).await.unwrap();
    let (mut other, peer) = bystander.dial(&target, &options).await.unwrap();
    // The accepting side ends the connection of whom it has revoked.
    at.revocations().insert([at.revoke(WEB1.into()).unwrap()]).unwrap();
    let mut rest = Vec::new();
    let ended = timeout(Duration::from_secs(5), held.read_to_end(&mut rest)).await;
    assert!(ended.is_ok(), "the connection goes on");
    let answer = foreign_call(&server, &client).await;
    assert_eq!(answer.headers()["grpc-status"], "16");
    let message = answer.headers()["grpc-message"].to_str().unwrap();
    assert!(message.contains("revoked"), "{message}");
    let forwarded = at.verify_forwarded(&client.principal().der, &[]).unwrap_err().to_string();
    assert!(forwarded.contains("was revoked on"), "{forwarded}");
    // Others aren't touched; then the connecting side revokes its peer.
    let mut some = [0; 64];
    assert!(other.read(&mut some).await.unwrap() > 0);
    let told = at.revoke(peer.uri()).unwrap();
    bystander.revocations().insert([told]).unwrap();
    let error = timeout(Duration::from_secs(5), other.read(&mut some)).await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the peer was revoked");
    let why = refused(&server.url(), &bystander).await;
    assert!(why.contains("was revoked on"), "{why}");
}
