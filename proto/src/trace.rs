//! W3C trace context: one id for all that belongs together, carried from the client through janus to the server in the
//! metadata `traceparent`, so that the log lines of one run can be found in all three programs, and its spans in a collector
//! where one is set (`spans`).
//!
//! An id that can't be read is as good as none: tracing never fails a call.

use std::{
    fmt,
    pin::Pin,
    str::FromStr,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Frame, SizeHint};
use opentelemetry::trace::{
    SpanContext, SpanId, Status as SpanStatus, TraceContextExt, TraceFlags, TraceId, TraceState,
};
use tonic::{Code, Status, body::Body};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::spans::in_trace;

/// Name of the header.
pub const TRACEPARENT: &str = "traceparent";

/// Where a call belongs: the trace, and the span that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceContext {
    trace: u128,
    /// 0: none, the trace begins here.
    parent: u64,
    flags: u8,
}

/// A header that isn't one of version 00 or of a later version that keeps its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a traceparent")]
pub struct NotATraceparent;

impl TraceContext {
    /// A new trace.
    pub fn fresh() -> Self {
        // Zero is no id.
        Self { trace: rand::random::<u128>().max(1), parent: 0, flags: 1 }
    }

    /// The trace of `header`, or a new one.
    pub fn of(header: Option<&http::HeaderValue>) -> Self {
        let read = header.and_then(|value| value.to_str().ok()).and_then(|text| text.parse().ok());
        read.unwrap_or_else(Self::fresh)
    }

    /// The same trace, as the next program is told of it: its parent is a span of ours that nobody collects.
    #[must_use]
    pub fn next(self) -> Self {
        Self { parent: span(), ..self }
    }

    /// Makes `span` part of this trace, below the span that made the call. Returns what the programs are told that are called
    /// within it.
    #[must_use]
    pub fn begin(self, span: &Span) -> Self {
        let context = match self.parent {
            0 => in_trace(self.trace, || span.context()),
            _ => {
                let (trace, parent) = (TraceId::from(self.trace), SpanId::from(self.parent));
                let flags = TraceFlags::new(self.flags);
                let caller = SpanContext::new(trace, parent, flags, true, TraceState::NONE);
                let parent = opentelemetry::Context::new().with_remote_span_context(caller);
                // Without a collector there is nothing to be set, and a fresh span was not begun before.
                let _ = span.set_parent(parent);
                span.context()
            }
        };
        Self::told_of(&context).unwrap_or_else(|| self.next())
    }

    /// What a program is told that is called within the present span; `None` where nobody collects spans.
    pub fn current() -> Option<Self> {
        Self::told_of(&Span::current().context())
    }

    fn told_of(context: &opentelemetry::Context) -> Option<Self> {
        let span = context.span();
        let span = span.span_context();
        span.is_valid().then(|| Self {
            trace: u128::from_be_bytes(span.trace_id().to_bytes()),
            parent: u64::from_be_bytes(span.span_id().to_bytes()),
            flags: span.trace_flags().to_u8(),
        })
    }

    /// The trace's id in hex digits.
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.trace)
    }

    /// As a header; hex digits and hyphens may always stand there.
    pub fn header(&self) -> Option<http::HeaderValue> {
        http::HeaderValue::from_str(&self.to_string()).ok()
    }
}

/// Says something of the present span to whoever collects it; it doesn't stand in the log.
pub fn note(name: &'static str, value: impl fmt::Display) {
    let span = Span::current();
    if !span.is_disabled() {
        span.set_attribute(name, value.to_string());
    }
}

/// Lets the span of a call last until its answer has been sent, and says how it ended.
pub fn until_end(response: Response<Body>, span: &Span) -> Response<Body> {
    if !span.context().span().span_context().is_sampled() {
        return response;
    }
    note_status(span, response.headers());
    response.map(|body| Body::new(Traced { body, span: span.clone() }))
}

fn note_status(span: &Span, headers: &HeaderMap) {
    let Some(code) = headers.get("grpc-status") else { return };
    let code = Code::from_bytes(code.as_bytes());
    span.set_attribute("rpc.grpc.status_code", code as i64);
    if code != Code::Ok {
        span.set_status(SpanStatus::error(format!("{code:?}")));
    }
}

/// A body that ends its span.
struct Traced {
    body: Body,
    span: Span,
}

impl Drop for Traced {
    fn drop(&mut self) {
        // A span lasts until it was left last.
        self.span.in_scope(|| {});
    }
}

impl http_body::Body for Traced {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            note_status(&self.span, trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn span() -> u64 {
    rand::random::<u64>().max(1)
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace, self.parent, self.flags)
    }
}

impl FromStr for TraceContext {
    type Err = NotATraceparent;

    fn from_str(text: &str) -> Result<Self, NotATraceparent> {
        let mut parts = text.split('-');
        let mut part = |digits: usize| {
            let part = parts.next().filter(|part| part.len() == digits).ok_or(NotATraceparent)?;
            let is_hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
            match part.bytes().all(is_hex) {
                true => u128::from_str_radix(part, 16).map_err(|_| NotATraceparent),
                false => Err(NotATraceparent),
            }
        };
        let (version, trace, parent, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        // Later versions may add parts; version 00 has none, and ff is forbidden.
        let has_more = parts.next().is_some();
        if version == 0xff || (version == 0 && has_more) || trace == 0 || parent == 0 {
            return Err(NotATraceparent);
        }
        // Their lengths are checked.
        Ok(Self { trace, parent: parent as u64, flags: flags as u8 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_trace_goes_on_with_another_parent() {
        let context: TraceContext = EXAMPLE.parse().unwrap();
        assert_eq!(context.to_string(), EXAMPLE);
        let next = context.next();
        assert_eq!(next.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_ne!(next.to_string(), EXAMPLE);
        let fresh = TraceContext::fresh().next();
        assert_eq!(fresh.to_string().parse(), Ok(fresh));
        assert_ne!(fresh.trace_id(), TraceContext::fresh().trace_id());
    }

    #[test]
    fn what_is_no_traceparent_begins_a_new_trace() {
        for wrong in [
            "",
            "00",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(wrong.parse::<TraceContext>(), Err(NotATraceparent), "{wrong}");
        }
        let later = "01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more";
        assert!(later.parse::<TraceContext>().is_ok());
        let of = |text: &'static str| {
            TraceContext::of(Some(&http::HeaderValue::from_static(text))).trace_id()
        };
        assert_eq!(of(EXAMPLE), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_ne!(of("nonsense"), of("nonsense"));
    }
}
