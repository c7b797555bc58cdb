//! What is measured of calls on their way through: how they ended, and how long they took. Read from headers and
//! trailers, never from messages; all labels come from fixed lists.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use http::HeaderMap;
use janus_proto::error::reason;
use prometheus_client::metrics::histogram::Histogram;
use tokio::time::Instant;
use tonic::{Code, Status};

/// Upper bounds of the buckets in seconds: from an answer out of memory to a commit of a large disk.
const BUCKETS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0, 1800.0];

/// Calls that ended with an error, by reason or, where there is none of ours, by gRPC code.
#[derive(Debug, Default)]
pub(crate) struct Errors(Mutex<BTreeMap<&'static str, u64>>);

impl Errors {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<&'static str, u64>> {
        // A panic elsewhere can't leave half a number.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the status in `headers`, if they carry one that is an error.
    pub fn note(&self, headers: &HeaderMap) {
        if !headers.contains_key("grpc-status") {
            return;
        }
        if let Some(status) = Status::from_header_map(headers) {
            self.note_status(&status);
        }
    }

    /// Counts a status, unless it is OK.
    pub fn note_status(&self, status: &Status) {
        if status.code() == Code::Ok {
            return;
        }
        let name = match reason(status) {
            Some(reason) => {
                let name = reason.as_str_name();
                name.strip_prefix("ERROR_REASON_").unwrap_or(name)
            }
            None => code_name(status.code()),
        };
        *self.lock().entry(name).or_default() += 1;
    }

    /// All counts.
    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.lock().clone()
    }
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Calls that are comparable in how long they take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// Start of a run, with all attempts.
    Start,
    /// One message each way, to the server that it names or that its run belongs to.
    Pinned,
    /// One message each way, to the server used last.
    Read,
    /// Answered here for all servers.
    Catalog,
    /// A stream to a server.
    Upload,
    /// A stream from a server.
    Download,
}

impl Class {
    const ALL: [Self; 6] =
        [Self::Start, Self::Pinned, Self::Read, Self::Catalog, Self::Upload, Self::Download];

    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pinned => "pinned",
            Self::Read => "read",
            Self::Catalog => "catalog",
            Self::Upload => "upload",
            Self::Download => "download",
        }
    }

    fn is_stream(self) -> bool {
        matches!(self, Self::Upload | Self::Download)
    }
}

/// How long calls took, by class. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Latencies(Arc<[Histogram; Class::ALL.len()]>);

impl Default for Latencies {
    fn default() -> Self {
        Self(Arc::new(Class::ALL.map(|_| Histogram::new(BUCKETS))))
    }
}

impl Latencies {
    /// A call of this class that came at `begun`.
    pub(crate) fn begin(&self, class: Class, begun: Instant) -> Stopwatch {
        Stopwatch { latencies: self.clone(), class, begun: Some(begun) }
    }

    /// Each class by its name.
    pub(crate) fn each(&self) -> impl Iterator<Item = (&'static str, &Histogram)> {
        Class::ALL.iter().map(|class| (class.name(), &self.0[*class as usize]))
    }
}

/// The time of one call: of a stream up to its first answer byte, of others up to their end. A call that its caller
/// gives up before that isn't counted.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    latencies: Latencies,
    class: Class,
    begun: Option<Instant>,
}

impl Stopwatch {
    /// Bytes of the answer have come.
    pub fn data(&mut self) {
        if self.class.is_stream() {
            self.end();
        }
    }

    /// The answer is complete.
    pub fn end(&mut self) {
        if let Some(begun) = self.begun.take() {
            self.latencies.0[self.class as usize].observe(begun.elapsed().as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::error::{ErrorReason, status};

    use super::*;

    #[test]
    fn errors_are_counted_by_reason_else_by_code() {
        let errors = Errors::default();
        let count = |status: &Status| {
            let mut headers = HeaderMap::new();
            status.add_header(&mut headers).unwrap();
            errors.note(&headers);
        };
        count(&status(ErrorReason::LeaseHeld, "x"));
        count(&status(ErrorReason::LeaseHeld, "y"));
        count(&Status::unknown("z"));
        count(&Status::ok(""));
        errors.note(&HeaderMap::new());
        let counts: Vec<_> = errors.counts().into_iter().collect();
        assert_eq!(counts, [("LEASE_HELD", 2), ("UNKNOWN", 1)]);
    }

    #[tokio::test(start_paused = true)]
    async fn streams_are_timed_to_their_first_byte_and_others_to_their_end() {
        let latencies = Latencies::default();
        let begin = |class| latencies.begin(class, Instant::now());
        let (mut stream, mut unary) = (begin(Class::Upload), begin(Class::Start));
        drop(begin(Class::Read));
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        stream.data();
        unary.data();
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        stream.end();
        unary.end();
        let sums: Vec<_> = latencies.each().map(|(name, times)| (name, times.sum())).collect();
        assert_eq!(
            sums,
            [
                ("start", 2.0),
                ("pinned", 0.0),
                ("read", 0.0),
                ("catalog", 0.0),
                ("upload", 1.0),
                ("download", 0.0)
            ]
        );
    }
}
