//! The router before the backup servers.
