//! Files out of images: what was put into real file systems comes out again by `ls`, `cat` and `cp`, through a reader that is a process of its
//! own; what is hostile ends in an error. What makes volumes needs root for loop devices.

#![allow(clippy::unwrap_used)] // Clippy lets tests unwrap, but doesn't know that the functions here belong to them.

mod copied;
mod damage;
mod damaged;
mod escapes;
mod images;
mod served;
mod tree;
