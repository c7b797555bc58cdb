//! What a listener lets its callers have.

use std::time::Duration;

use crate::channel::{CONNECTION_WINDOW_BYTES, MAX_FRAME_BYTES, STREAM_WINDOW_BYTES};

/// Default of [`Limits::stall`]: a line of 64 kbit/s gets two pieces through.
pub const STALL: Duration = Duration::from_secs(300);

/// What a caller may send before it was read, and in which pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Largest HTTP/2 frame.
    pub frame_bytes: u32,
    /// Of one stream: its throughput on a long line is this divided by the round trip.
    pub stream_bytes: u32,
    /// Of all streams of a connection.
    pub connection_bytes: u32,
}

impl Default for Windows {
    fn default() -> Self {
        Self {
            frame_bytes: MAX_FRAME_BYTES,
            stream_bytes: STREAM_WINDOW_BYTES,
            connection_bytes: CONNECTION_WINDOW_BYTES,
        }
    }
}

/// Limits of a listener.
#[derive(Debug, Clone)]
pub struct Limits {
    /// What is received ahead.
    pub windows: Windows,
    /// Open connections of peers that have proved who they are; more are closed at once, so that a caller goes to another server
    /// instead of waiting.
    pub max_connections: usize,
    /// The same for peers without a certificate, where a [`Door`](super::Door) lets them in …
    pub max_strangers: usize,
    /// … who must have done after this time.
    pub stranger_time: Duration,
    /// Handshakes that have begun; more connections are closed at once.
    pub max_handshakes: usize,
    /// The same of one address (of IPv6: of one /64).
    pub max_handshakes_per_address: usize,
    /// Handshakes that an address may begin in a second …
    pub handshakes_per_second: u32,
    /// … with so many saved up, for all those behind one address who come back after an interruption.
    pub handshakes_saved: u32,
    /// Connections of one caller; on more, each call is refused with TOO_MANY.
    pub max_connections_per_caller: usize,
    /// Open calls of one caller on all its connections; more are refused with TOO_MANY.
    pub max_calls_per_caller: usize,
    /// From the TCP accept to the end of the TLS handshake, and again from there to the first HTTP/2 frame.
    pub handshake_timeout: Duration,
    /// A caller must take each piece of an answer (1 MiB at most), and end each message that it sends, within this time.
    pub stall: Duration,
    /// A connection is pinged this often …
    pub keepalive_interval: Duration,
    /// … and dropped when an answer takes longer than this.
    pub keepalive_timeout: Duration,
    /// After shutdown begins, how long open calls may go on.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            windows: Windows::default(),
            max_connections: 1024,
            max_strangers: 64,
            stranger_time: Duration::from_secs(15),
            max_handshakes: 512,
            max_handshakes_per_address: 64,
            handshakes_per_second: 64,
            handshakes_saved: 1024,
            max_connections_per_caller: 64,
            max_calls_per_caller: 128,
            handshake_timeout: Duration::from_secs(5),
            stall: STALL,
            keepalive_interval: Duration::from_secs(20),
            keepalive_timeout: Duration::from_secs(20),
            drain: Duration::from_secs(10),
        }
    }
}
