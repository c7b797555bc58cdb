//! The backup client: reads disks, decides what to send, restores.
