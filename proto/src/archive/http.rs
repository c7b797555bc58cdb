//! Requests to object stores, by our own HTTP and TLS. Nothing is waited for that makes no progress: a request ends when nothing
//! of it was sent or received for some time, however long the whole takes.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
        HttpResponseBody, HttpService,
    },
};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::trust::trusting;

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(10);

/// Makes requests; keeps connections.
#[derive(Debug, Clone)]
pub struct Connector {
    client: Client<HttpsConnector<HttpConnector>, Sent>,
    silence: Duration,
}

impl Connector {
    /// Requests end after so long a silence. Servers are checked against the authorities that this system trusts.
    ///
    /// # Errors
    /// Says why these can't be read.
    pub fn new(silence: Duration) -> Result<Self, String> {
        let tls = trusting(None)?;
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_nodelay(true);
        tcp.enforce_http(false);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        Ok(Self { client: Client::builder(TokioExecutor::new()).build(connector), silence })
    }
}

impl object_store::client::HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

#[tonic::async_trait]
impl HttpService for Connector {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let moved = Moved::default();
        let request = request.map(|body| Sent { body, moved: moved.clone() });
        let mut answer = std::pin::pin!(self.client.request(request));
        let answer = loop {
            let end = moved.last() + self.silence;
            tokio::select! {
                biased;
                answer = &mut answer => break answer,
                () = sleep_until(end) => {
                    if moved.last() + self.silence <= Instant::now() {
                        return Err(silent());
                    }
                }
            }
        };
        let answer = answer.map_err(|error| {
            let kind = if error.is_connect() {
                HttpErrorKind::Connect
            } else {
                HttpErrorKind::Interrupted
            };
            HttpError::new(kind, Told(crate::channel::explain_error(&error)))
        })?;
        let silence = self.silence;
        let until = Box::pin(sleep_until(Instant::now() + silence));
        Ok(answer.map(|body| HttpResponseBody::new(Received { body, silence, until })))
    }
}

/// An error in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Told(String);

fn silent() -> HttpError {
    HttpError::new(HttpErrorKind::Timeout, Told("the store went silent".into()))
}

/// When something was sent last.
#[derive(Debug, Clone)]
struct Moved(Arc<Mutex<Instant>>);

impl Default for Moved {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }
}

impl Moved {
    fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// The body of a request, which notes that it moves.
struct Sent {
    body: HttpRequestBody,
    moved: Moved,
}

impl Body for Sent {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        self.moved.note();
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of an answer, which ends when nothing comes.
struct Received {
    body: Incoming,
    silence: Duration,
    until: Pin<Box<Sleep>>,
}

impl Body for Received {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(frame) => {
                let end = Instant::now() + self.silence;
                self.until.as_mut().reset(end);
                let lost = |error: hyper::Error| {
                    HttpError::new(
                        HttpErrorKind::Interrupted,
                        Told(crate::channel::explain_error(&error)),
                    )
                };
                Poll::Ready(frame.map(|frame| frame.map_err(lost)))
            }
            Poll::Pending => {
                ready!(self.until.as_mut().poll(context));
                Poll::Ready(Some(Err(silent())))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
