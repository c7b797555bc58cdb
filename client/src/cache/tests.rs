//! Tests of the cache against a naive model, under kills and damage.

mod facts;
mod invariant;
mod kill;
mod model;
mod size;
