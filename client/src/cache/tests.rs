//! Tests of the cache against a naive model, under kills and damage.

mod facts;
mod invariant;
pub(in crate::cache) mod kill;
mod model;
mod size;
