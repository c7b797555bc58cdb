//! An S3 server on loopback, over a folder: `cargo xtask bench --seeding` archives into it. Says its URL, and ends with its input.

#![allow(clippy::unwrap_used)]
// A measurement that can't be made has no result to go on with.
// The archive's tests use more of it.
#![allow(dead_code)]

#[path = "../tests/archive/s3.rs"]
mod s3;

fn main() {
    let server = s3::S3::start();
    println!("{} {} {} {}", server.endpoint(), s3::BUCKET, s3::KEY, s3::SECRET);
    let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
}
