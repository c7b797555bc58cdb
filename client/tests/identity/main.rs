//! Who somebody is, and for how long: enrolment, renewal, revocation, and calls that their callers have signed. Real
//! programs, and certificates of all roles.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod accounts;
mod directory;
mod enrolment;
mod foreign_pki;
mod groups;
mod proofs;
mod revocation;
mod rights;
mod rotation;
mod scene;
