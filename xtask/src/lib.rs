//! Development commands of Janus Backup, and what they share with the whole-system tests.
//!
//! `site` runs real servers, a janus and clients as processes on loopback; `disk` makes and changes disk images.
//! Nothing here is part of a program that users run.

pub mod bench;
pub mod bindings;
pub mod demo;
pub mod disk;
pub mod dist;
pub mod hostile;
pub mod loopback;
pub mod measure;
pub mod noise;
pub mod ntfs;
pub mod packages;
pub mod site;
