//! An S3 server on loopback (`s3s-fs`), and before it what goes wrong with such servers and the ways to them.

use std::{
    convert::Infallible,
    fs, io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes, Frame, Incoming},
    service::{Service, service_fn},
};
use hyper_util::rt::TokioIo;
use s3s::{
    auth::SimpleAuth,
    service::{S3Service, S3ServiceBuilder},
};
use tokio::net::TcpListener;

pub const BUCKET: &str = "backups";
pub const KEY: &str = "AKIDEXAMPLE";
pub const SECRET: &str = "a-secret-of-the-archive";

/// What goes wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An error of the server.
    Status(u16),
    /// The connection is closed before an answer.
    Close,
    /// The request is done, and its answer lost.
    LoseAnswer,
    /// No answer, for so long.
    Silence(Duration),
    /// Half of the body comes, then the connection is closed.
    Truncate,
    /// The first half of the body comes, then nothing for so long.
    Hang(Duration),
    /// All comes, later.
    Slow(Duration),
}

/// Faults of some requests: of this method every so manieth.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub method: &'static str,
    pub every: u64,
    pub fault: Fault,
}

#[derive(Default)]
struct State {
    plans: Mutex<Vec<(Plan, u64)>>,
    /// Bytes of bodies of requests that write.
    put_bytes: AtomicU64,
    got_bytes: AtomicU64,
    faults: AtomicU64,
}

/// The server.
pub struct S3 {
    folder: tempfile::TempDir,
    port: u16,
    state: Arc<State>,
    end: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

impl S3 {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(BUCKET)).unwrap();
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(folder.path()).unwrap());
        builder.set_auth(SimpleAuth::from_single(KEY, SECRET));
        let (service, state) = (builder.build(), Arc::new(State::default()));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (end, ended) = tokio::sync::oneshot::channel();
        let shared = state.clone();
        let thread = thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    () = serve(listener, service, shared) => {}
                    _ = ended => {}
                }
            });
        });
        Self { folder, port, state, end: Some(end), thread: Some(thread) }
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Where its objects are as files.
    pub fn objects(&self) -> PathBuf {
        self.folder.path().join(BUCKET)
    }

    pub fn plan(&self, plans: &[Plan]) {
        *self.state.plans.lock().unwrap() = plans.iter().map(|plan| (*plan, 0)).collect();
    }

    /// Bytes that were written since it was asked last.
    pub fn take_put_bytes(&self) -> u64 {
        self.state.put_bytes.swap(0, Ordering::Relaxed)
    }

    pub fn take_got_bytes(&self) -> u64 {
        self.state.got_bytes.swap(0, Ordering::Relaxed)
    }

    pub fn take_faults(&self) -> u64 {
        self.state.faults.swap(0, Ordering::Relaxed)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        drop(self.end.take());
        let _ = self.thread.take().unwrap().join();
    }
}

async fn serve(listener: TcpListener, service: S3Service, state: Arc<State>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (service, state) = (service.clone(), state.clone());
        tokio::spawn(async move {
            let answer = service_fn(|request| one(request, service.clone(), state.clone()));
            let builder = hyper::server::conn::http1::Builder::new();
            let _ = builder.serve_connection(TokioIo::new(stream), answer).await;
        });
    }
}

async fn one(
    request: Request<Incoming>,
    service: S3Service,
    state: Arc<State>,
) -> Result<Answer, io::Error> {
    let (method, fault) = (request.method().clone(), state.fault(request.method()));
    match fault {
        Some(Fault::Close) => return Err(io::ErrorKind::ConnectionReset.into()),
        Some(Fault::Status(code)) => {
            // As servers do that are at their end: without a look at the body.
            let _ = request.into_body().collect().await;
            let body = Full::new(Bytes::from_static(b"<Error><Code>InternalError</Code></Error>"));
            let answer = Response::builder().status(StatusCode::from_u16(code).unwrap());
            return Ok(answer.body(body.map_err(never).boxed_unsync()).unwrap());
        }
        Some(Fault::Silence(time) | Fault::Slow(time)) => tokio::time::sleep(time).await,
        _ => {}
    }
    if let Some(Fault::Silence(_)) = fault {
        return Err(io::ErrorKind::TimedOut.into());
    }
    if method == Method::PUT {
        let length = request.headers().get("content-length");
        let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
        state.put_bytes.fetch_add(length.unwrap_or_default(), Ordering::Relaxed);
    }
    let answer = Service::call(&service, request).await;
    let answer = answer.map_err(|error| io::Error::other(format!("{error:?}")))?;
    if fault == Some(Fault::LoseAnswer) {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    let length = answer.headers().get("content-length");
    let length = length.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if method == Method::GET {
        state.got_bytes.fetch_add(length.unwrap_or_default(), Ordering::Relaxed);
    }
    let half = length.unwrap_or_default() / 2;
    Ok(answer.map(|body| {
        let body = body.map_err(|error| io::Error::other(error.to_string()));
        match fault {
            Some(Fault::Truncate) => Half::new(body, half, None).boxed_unsync(),
            Some(Fault::Hang(time)) => Half::new(body, half, Some(time)).boxed_unsync(),
            _ => body.boxed_unsync(),
        }
    }))
}

fn never(error: Infallible) -> io::Error {
    match error {}
}

impl State {
    /// Whether this request is one that something goes wrong with.
    fn fault(&self, method: &Method) -> Option<Fault> {
        let mut plans = self.plans.lock().unwrap();
        let mut fault = None;
        for (plan, count) in plans.iter_mut().filter(|(plan, _)| plan.method == method.as_str()) {
            *count += 1;
            if *count % plan.every == 0 {
                fault = Some(plan.fault);
            }
        }
        if fault.is_some() {
            self.faults.fetch_add(1, Ordering::Relaxed);
        }
        fault
    }
}

/// The first bytes of a body; then it breaks, maybe after some time.
struct Half<B> {
    body: B,
    left: u64,
    hang: Option<Duration>,
    waiting: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl<B> Half<B> {
    fn new(body: B, left: u64, hang: Option<Duration>) -> Self {
        Self { body, left, hang, waiting: None }
    }
}

impl<B: Body<Data = Bytes, Error = io::Error> + Unpin> Body for Half<B> {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if self.left == 0 {
            if let Some(time) = self.hang.take() {
                self.waiting = Some(Box::pin(tokio::time::sleep(time)));
            }
            if let Some(waiting) = &mut self.waiting {
                std::task::ready!(waiting.as_mut().poll(context));
            }
            return Poll::Ready(Some(Err(io::ErrorKind::ConnectionReset.into())));
        }
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
        let Some(Ok(frame)) = frame else { return Poll::Ready(frame) };
        let Ok(mut data) = frame.into_data() else { return Poll::Ready(None) };
        data.truncate(self.left as usize);
        self.left -= data.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(data))))
    }
}

/// All files below a folder whose names hold `part`, sorted.
pub fn files(folder: &Path, part: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            match entry.file_type().unwrap().is_dir() {
                true => folders.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found.retain(|path| path.file_name().unwrap().to_str().unwrap().contains(part));
    found.sort();
    found
}
