//! Where an archive is, and calls to it: tried again for as long as the store may be well again soon.

use std::{
    fmt,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{
    Error as StoreError, GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::MicrosoftAzureBuilder,
    gcp::GoogleCloudStorageBuilder,
    local::LocalFileSystem,
    path::Path,
};
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{ArchiveError, PATIENCE, http::Connector, told};

/// Between two tries.
const PAUSE: Duration = Duration::from_millis(500);
/// Trouble that lasts longer is told.
const PATIENCE_UNTOLD: Duration = Duration::from_secs(5);
/// What is handed to the connection at once: it shows that a large object moves.
const PIECE: usize = 256 << 10;
/// How long a silent store is waited for, where nothing else is said.
pub const SILENCE: Duration = Duration::from_secs(30);

/// Where an archive is.
#[derive(Clone, PartialEq, Eq)]
pub struct Place {
    /// `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX`, `az://CONTAINER/PREFIX` or `file:///FOLDER`.
    pub url: String,
    /// URL of a store that is not its maker's own; empty: that one.
    pub endpoint: String,
    /// Region; empty: as the environment says.
    pub region: String,
    /// Other options by their names in the environment, with credentials among them. Others come from the environment.
    pub options: Vec<(String, String)>,
    /// A request ends after so long a silence.
    pub silence: Duration,
}

/// Without what the options say.
impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place")
            .field("url", &self.url)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl Place {
    /// At this URL, all else from the environment.
    pub fn new(url: impl Into<String>) -> Self {
        let (url, empty) = (url.into(), String::new);
        Self { url, endpoint: empty(), region: empty(), options: Vec::new(), silence: SILENCE }
    }

    fn setup(&self, reason: impl fmt::Display) -> ArchiveError {
        ArchiveError::Setup { url: shown(&self.url), reason: reason.to_string() }
    }

    /// Scheme, bucket and prefix.
    fn parts(&self) -> Result<(&str, &str, &str), ArchiveError> {
        let kinds =
            "write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///FOLDER";
        let (scheme, rest) = self.url.split_once("://").ok_or_else(|| self.setup(kinds))?;
        if !matches!(scheme, "s3" | "gs" | "az" | "file") {
            return Err(self.setup(kinds));
        }
        if scheme != "file" && rest.contains(['?', '#', '@']) {
            return Err(self.setup(
                "only a bucket and a prefix: credentials come from the environment or a file",
            ));
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        match bucket.is_empty() == (scheme == "file") {
            true => Ok((scheme, bucket, prefix)),
            false => Err(self.setup(kinds)),
        }
    }

    /// Checks what can be told without asking anybody.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check(&self) -> Result<(), ArchiveError> {
        let (scheme, _, prefix) = self.parts()?;
        if scheme != "file" {
            Path::parse(prefix).map_err(|error| self.setup(error))?;
        }
        let has_end = !self.endpoint.is_empty();
        if has_end
            && !self.endpoint.starts_with("https://")
            && !self.endpoint.starts_with("http://")
        {
            return Err(self.setup("its endpoint is no URL: write https://HOST[:PORT]"));
        }
        if has_end && matches!(scheme, "gs" | "file") {
            return Err(self.setup(format!("{scheme}:// has no endpoint")));
        }
        Ok(())
    }

    /// Opens it; no call is made yet. `stop` ends calls.
    ///
    /// # Errors
    /// When it can't be set up like this.
    pub fn open(&self, stop: &CancellationToken) -> Result<Store, ArchiveError> {
        self.check()?;
        let (scheme, bucket, prefix) = self.parts()?;
        let inner: Arc<dyn ObjectStore> = match scheme {
            "file" => {
                let folder = format!("/{prefix}");
                if !std::path::Path::new(&folder).is_dir() {
                    return Err(self.setup("there is no such folder: is it mounted? Make it, as the server's user can write to it"));
                }
                let local = LocalFileSystem::new_with_prefix(&folder);
                let local = local.map_err(|error| self.setup(error))?;
                return Ok(Store::new(Arc::new(local.with_fsync(true)), Path::default(), stop));
            }
            "s3" => self.s3(bucket)?,
            "gs" => self.gs(bucket)?,
            _ => self.az(bucket)?,
        };
        let prefix = Path::parse(prefix).map_err(|error| self.setup(error))?;
        Ok(Store::new(inner, prefix, stop))
    }

    fn connector(&self) -> Result<Connector, ArchiveError> {
        Connector::new(self.silence).map_err(|error| self.setup(error))
    }

    fn s3(&self, bucket: &str) -> Result<Arc<dyn ObjectStore>, ArchiveError> {
        let mut builder = AmazonS3Builder::from_env().with_bucket_name(bucket);
        for (key, value) in &self.options {
            let key = key.to_ascii_lowercase().parse().map_err(|_| self.unknown(key))?;
            builder = builder.with_config(key, value);
        }
        if !self.endpoint.is_empty() {
            builder = builder.with_endpoint(&self.endpoint);
        }
        if !self.region.is_empty() {
            builder = builder.with_region(&self.region);
        }
        // Without any the library would ask for a role of the machine at an address that only Amazon's machines have.
        if ROLES.iter().all(|key| builder.get_config_value(key).is_none()) {
            return Err(self.setup(
                "no credentials: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are needed (where the machine has a role at Amazon: AWS_METADATA_ENDPOINT=http://169.254.169.254)",
            ));
        }
        let builder = builder.with_retry(retries()).with_http_connector(self.connector()?);
        Ok(Arc::new(builder.build().map_err(|error| self.setup(error))?))
    }

    fn gs(&self, bucket: &str) -> Result<Arc<dyn ObjectStore>, ArchiveError> {
        let mut builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket);
        for (key, value) in &self.options {
            let key = key.to_ascii_lowercase().parse().map_err(|_| self.unknown(key))?;
            builder = builder.with_config(key, value);
        }
        let builder = builder.with_retry(retries()).with_http_connector(self.connector()?);
        Ok(Arc::new(builder.build().map_err(|error| self.setup(error))?))
    }

    fn az(&self, container: &str) -> Result<Arc<dyn ObjectStore>, ArchiveError> {
        let mut builder = MicrosoftAzureBuilder::from_env().with_container_name(container);
        for (key, value) in &self.options {
            let key = key.to_ascii_lowercase().parse().map_err(|_| self.unknown(key))?;
            builder = builder.with_config(key, value);
        }
        if !self.endpoint.is_empty() {
            builder = builder.with_endpoint(self.endpoint.clone());
        }
        let builder = builder.with_retry(retries()).with_http_connector(self.connector()?);
        Ok(Arc::new(builder.build().map_err(|error| self.setup(error))?))
    }

    fn unknown(&self, key: &str) -> ArchiveError {
        self.setup(format!("its credentials name {key:?}, which such a store doesn't know"))
    }
}

/// A URL as it is told: without what may be a password in it.
pub fn shown(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://").filter(|(scheme, _)| *scheme != "file") else {
        return url.to_owned();
    };
    let bare = rest.split('?').next().unwrap_or_default();
    match bare.rsplit_once('@') {
        Some((_, place)) => format!("{scheme}://***@{place}"),
        None => format!("{scheme}://{bare}"),
    }
}

/// What credentials of S3 come from.
const ROLES: [AmazonS3ConfigKey; 5] = [
    AmazonS3ConfigKey::AccessKeyId,
    AmazonS3ConfigKey::WebIdentityTokenFile,
    AmazonS3ConfigKey::ContainerCredentialsRelativeUri,
    AmazonS3ConfigKey::ContainerCredentialsFullUri,
    AmazonS3ConfigKey::MetadataEndpoint,
];

/// Few: what is made of the answer, [`Store::again`] tries again as a whole.
fn retries() -> RetryConfig {
    RetryConfig { max_retries: 2, retry_timeout: Duration::from_secs(30), ..RetryConfig::default() }
}

/// An archive that is open. Clones share its counts.
#[derive(Clone)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    prefix: Path,
    stop: CancellationToken,
    patience: Duration,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Store {
    /// Over any store.
    pub fn new(inner: Arc<dyn ObjectStore>, prefix: Path, stop: &CancellationToken) -> Self {
        Self { inner, prefix, stop: stop.clone(), patience: PATIENCE, counts: Arc::default() }
    }

    /// The same, which waits no longer than this for a store that can't be asked.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// What all names begin with.
    pub fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// Bytes of objects that were written.
    pub fn sent_bytes(&self) -> u64 {
        self.counts.sent.load(Ordering::Relaxed)
    }

    /// Bytes of objects that were read.
    pub fn received_bytes(&self) -> u64 {
        self.counts.received.load(Ordering::Relaxed)
    }

    /// Makes a call, again for as long as the store may be well again soon.
    async fn again<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        object: &Path,
        call: impl Fn() -> F,
    ) -> Result<T, ArchiveError> {
        let began = Instant::now();
        let mut is_told = false;
        loop {
            let error = tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(ArchiveError::Stopped),
                done = call() => match done {
                    Ok(done) => return Ok(done),
                    Err(error) => error,
                },
            };
            let passes = passes(&error);
            if !passes || began.elapsed() > self.patience {
                return Err(failed(object, error, passes));
            }
            if !is_told && began.elapsed() > PATIENCE_UNTOLD {
                is_told = true;
                let seconds = self.patience.as_secs();
                tracing::warn!(%object, %error, "an object store doesn't answer as it should; trying again for {seconds} s");
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(ArchiveError::Stopped),
                () = sleep(PAUSE) => {}
            }
        }
    }

    /// Writes an object, over one that is there.
    ///
    /// # Errors
    /// When it can't be written.
    pub async fn put(&self, object: &Path, bytes: &Bytes) -> Result<(), ArchiveError> {
        self.write(object, bytes, PutMode::Overwrite).await
    }

    /// Writes an object that isn't there yet. One with the same content may be: the answer to an earlier try was lost.
    ///
    /// # Errors
    /// `Occupied` when another is there, or it can't be written.
    pub async fn create(&self, object: &Path, bytes: &Bytes) -> Result<(), ArchiveError> {
        match self.write(object, bytes, PutMode::Create).await {
            Err(ArchiveError::Occupied { object: name }) => {
                let there = self.get(object, bytes.len() as u64).await;
                match there {
                    Ok(there) if there == *bytes => Ok(()),
                    Ok(_) | Err(ArchiveError::Damaged { .. }) => {
                        Err(ArchiveError::Occupied { object: name })
                    }
                    Err(error) => Err(error),
                }
            }
            done => done,
        }
    }

    async fn write(&self, object: &Path, bytes: &Bytes, mode: PutMode) -> Result<(), ArchiveError> {
        let put = || async {
            let pieces = (0..bytes.len())
                .step_by(PIECE)
                .map(|at| bytes.slice(at..bytes.len().min(at + PIECE)));
            let payload: PutPayload = pieces.collect();
            let options = PutOptions { mode: mode.clone(), ..PutOptions::default() };
            self.inner.put_opts(object, payload, options).await.map(drop)
        };
        self.again(object, put).await?;
        self.counts.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Reads an object of at most so many bytes.
    ///
    /// # Errors
    /// When it is missing, larger, or can't be read.
    pub async fn get(&self, object: &Path, most: u64) -> Result<Bytes, ArchiveError> {
        let get = || async {
            let result = self.inner.get_opts(object, GetOptions::default()).await?;
            let size = result.meta.size;
            if size > most {
                return Ok(Err(size));
            }
            let bytes = result.bytes().await?;
            whole(bytes, size).map(Ok)
        };
        let bytes = self.again(object, get).await?;
        let bytes = bytes.map_err(|size| {
            ArchiveError::damaged(told(object), format!("it has {size} bytes, more than {most}"))
        })?;
        self.counts.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Reads a range of an object.
    ///
    /// # Errors
    /// When it is missing, shorter, or can't be read.
    pub async fn range(&self, object: &Path, range: Range<u64>) -> Result<Bytes, ArchiveError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let get = || async {
            let options = GetOptions::new().with_range(Some(range.clone()));
            let result = match self.inner.get_opts(object, options).await {
                Ok(result) => result,
                // Asked for what lies behind the end, it says anything but that.
                Err(error) => match self.inner.head(object).await {
                    Ok(meta) if meta.size < range.end => return Ok(Err(meta.size)),
                    _ => return Err(error),
                },
            };
            // Asked for more than there is, a store gives what there is.
            if result.meta.size < range.end {
                return Ok(Err(result.meta.size));
            }
            let bytes = result.bytes().await?;
            whole(bytes, range.end - range.start).map(Ok)
        };
        let bytes = self.again(object, get).await?;
        let bytes = bytes.map_err(|size| {
            ArchiveError::damaged(told(object), format!("it has only {size} bytes"))
        })?;
        self.counts.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    /// All objects below a folder, with their sizes, in the order of their names.
    ///
    /// # Errors
    /// When they can't be listed.
    pub async fn list(&self, folder: &Path) -> Result<Vec<(Path, u64)>, ArchiveError> {
        let list = || async {
            let entries =
                self.inner.list(Some(folder)).map_ok(|entry| (entry.location, entry.size));
            entries.try_collect::<Vec<_>>().await
        };
        let mut entries = self.again(folder, list).await?;
        entries.sort_unstable();
        Ok(entries)
    }

    /// Names of the folders in a folder.
    ///
    /// # Errors
    /// When they can't be listed.
    pub async fn folders(&self, folder: &Path) -> Result<Vec<String>, ArchiveError> {
        let list = || self.inner.list_with_delimiter(Some(folder));
        let listed = self.again(folder, list).await?;
        Ok(listed
            .common_prefixes
            .iter()
            .filter_map(|path| path.filename().map(str::to_owned))
            .collect())
    }

    /// Removes an object; one that is gone is gone.
    ///
    /// # Errors
    /// When it can't be removed.
    pub async fn delete(&self, object: &Path) -> Result<(), ArchiveError> {
        match self.again(object, || self.inner.delete(object)).await {
            Err(ArchiveError::Missing { .. }) => Ok(()),
            done => done,
        }
    }
}

/// An answer that ended early is as good as none.
fn whole(bytes: Bytes, expected: u64) -> Result<Bytes, StoreError> {
    match bytes.len() as u64 == expected {
        true => Ok(bytes),
        false => Err(StoreError::Generic {
            store: "archive",
            source: format!("{} bytes came, not {expected}", bytes.len()).into(),
        }),
    }
}

/// Whether the same call may go well later.
fn passes(error: &StoreError) -> bool {
    match error {
        // A folder says what is so: it is full, or can't be written.
        StoreError::Generic { store: "LocalFileSystem", .. } => false,
        StoreError::Generic { .. } => may_pass(&error.to_string()),
        StoreError::JoinError { .. } => true,
        _ => false,
    }
}

/// The library tells the status of an answer only in words: 4xx is for good (no such bucket, no such key), but for those that say
/// that a request came too slowly or too often.
fn may_pass(error: &str) -> bool {
    !error.contains("non-2xx status code: 4")
        || ["status code: 408", "status code: 429", "RequestTimeout"]
            .iter()
            .any(|passing| error.contains(passing))
}

fn failed(object: &Path, error: StoreError, passes: bool) -> ArchiveError {
    let object = told(object);
    match error {
        StoreError::NotFound { .. } => ArchiveError::Missing { object },
        StoreError::AlreadyExists { .. } | StoreError::Precondition { .. } => {
            ArchiveError::Occupied { object }
        }
        error => {
            let reason = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            ArchiveError::Store { object, reason, passes }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_told_without_what_may_be_secret() {
        for (url, told) in [
            ("s3://key:se@cret@bucket/prefix", "s3://***@bucket/prefix"),
            ("s3://bucket/prefix?key=secret", "s3://bucket/prefix"),
            ("file:///mnt/a@b?c#d 100%", "file:///mnt/a@b?c#d 100%"),
        ] {
            assert_eq!(shown(url), told);
            let checked = Place::new(url).check();
            assert_eq!(checked.is_ok(), url.starts_with("file"), "{checked:?}");
            assert!(checked.err().is_none_or(|error| !error.to_string().contains("cret")));
        }
    }

    #[test]
    fn what_a_store_refuses_is_not_asked_for_again() {
        let answered = |status: &str| {
            may_pass(&format!("Generic S3 error: Server returned non-2xx status code: {status}"))
        };
        for passing in [
            "500 Internal Server Error",
            "503",
            "429 Too Many Requests",
            "408",
            "400: RequestTimeout",
        ] {
            assert!(answered(passing), "{passing}");
        }
        for lasting in ["404 Not Found: NoSuchBucket", "400 Bad Request", "403 Forbidden"] {
            assert!(!answered(lasting), "{lasting}");
        }
        assert!(may_pass("Generic S3 error: connection reset"));
    }
}
