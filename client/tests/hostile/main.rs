//! Bytes of others: see `xtask::hostile`, which the targets of `janus_client::fuzz` are handed to; and what damaged volumes are
//! believed to be (`truth`). What makes volumes needs root.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

mod images;
#[path = "../ntfs/scene.rs"]
#[allow(dead_code, unreachable_pub)]
mod scene;
mod truth;
#[path = "../free_space/volume.rs"]
#[allow(dead_code, unreachable_pub)]
mod volume;

xtask::hostile!(
    janus_client::fuzz;
    ntfs,
    mft_record,
    usn_records,
    ext4,
    xfs,
    partitions,
    qcow2_info,
    cursor,
    nbd,
    nbd_server
);

/// Run by hand when a format changes: `cargo test -p janus-client --test hostile -- --ignored`.
#[test]
#[ignore = "writes the committed inputs anew"]
fn write_the_corpus() {
    for target in targets() {
        let made = images::corpus(target.name);
        let inputs = (target.seeds)().into_iter().chain(made).collect();
        xtask::hostile::write_corpus(env!("CARGO_MANIFEST_DIR"), &target, inputs);
    }
}
