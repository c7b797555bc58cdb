//! The client of Janus Backup: reads disks, decides what has to travel, and brings disks back.

pub mod backup;
pub mod cache;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod delta;
pub mod dry_run;
pub mod frozen;
pub mod fs;
pub mod fuzz;
pub mod hooks;
pub mod journal;
pub mod link;
pub mod nbd;
pub mod progress;
pub mod reading;
pub mod reconcile;
pub mod restore;
pub mod scan;
pub mod source;
pub mod sources;
pub mod state;
pub mod survey;
pub mod transfer;
pub mod volume;
pub mod ways;
