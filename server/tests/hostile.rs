//! Bytes of others: see `xtask::hostile`, which the targets of `janus_server::fuzz` are handed to.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

xtask::hostile!(
    janus_server::fuzz;
    vhd,
    vhdx_header,
    vhdx_regions,
    vhdx_metadata,
    vhdx_bat,
    vhdx_log,
    parent_locator,
    manifest,
    carried,
    table,
    session_journal,
    mirror_record,
    table_message,
    archive_manifest,
    archive_index,
    report,
    services
);

/// Run by hand when a format changes: `cargo test -p janus-server --test hostile -- --ignored`.
#[test]
#[ignore = "writes the committed inputs anew"]
fn write_the_corpus() {
    for target in targets() {
        xtask::hostile::write_corpus(env!("CARGO_MANIFEST_DIR"), &target, (target.seeds)());
    }
}
