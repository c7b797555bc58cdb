//! Wiring: store, services, reports, health, and an end in good order.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use janus_proto::{
    channel::Dialer,
    health::{health, set_all},
    ids::{MachineKey, ServerId},
    listener::{Door, Limits},
    model::MAX_MESSAGE_BYTES,
    pb::{
        self, backup_service_server::BackupServiceServer,
        catalog_service_server::CatalogServiceServer, probe_service_server::ProbeServiceServer,
        restore_service_server::RestoreServiceServer,
        server_info_service_server::ServerInfoServiceServer,
        table_service_server::TableServiceServer,
    },
    plain_health, program,
    settings::changed_keys,
    show::date,
    tls::{Identity, Role, TlsError},
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    admin::{Admin, queue, socket::AdminSocket},
    audit::{Action, Audit, Event, Who},
    backup::Backup,
    bounds::{Bounds, Plan},
    caller::Gate,
    catalog::Catalog,
    chain::store::{MachineState, Store, StoreError},
    config::{self, Settings, Size},
    enroll::Enrollment,
    fill::Filler,
    info::Info,
    mirror::{self, Mirror},
    pki::Authority,
    policy::{Policy, file::PolicyError, follow::Follow},
    probe::Probe,
    prove::follow::Schedule,
    replicate::Replication,
    report::Reporter,
    restore::{HANDLE_LEASE, Restore},
    retention,
    revoked::Revoked,
    runs::{self, Runs},
    space::{self, Space},
    storage,
    tables::Tables,
    verify::scrub::Scrub,
};

/// How often old open runs are looked for.
const EXPIRY_ROUND: Duration = Duration::from_secs(3600);

/// Why a server did not start or run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The certificate is of another role.
    #[error("the certificate says {role}: a server needs one of `janus-server pki issue server`")]
    WrongRole {
        /// What it says.
        role: String,
    },
    /// The address can't be had.
    #[error("cannot listen on {address}: {source}; choose another address in setting {key}")]
    Listen {
        /// The setting.
        key: &'static str,
        /// The address.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Certificate, key or CA.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The rights of groups.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The store would be shared.
    #[error("image_path {} is on a network file system ({kind}): its loss would be that of every server on it; use a local disk, or remove janus_urls", path.display())]
    NetworkFileSystem {
        /// The setting.
        path: PathBuf,
        /// Kind of file system.
        kind: &'static str,
    },
    /// Wiring that can't fail for valid names.
    #[error("cannot start: {0}")]
    Wiring(String),
}

/// A server that has opened its store and listens, but serves nothing yet.
pub struct Server {
    settings: Settings,
    identity: Identity,
    id: ServerId,
    runs: Arc<Runs>,
    revoked: Arc<Revoked>,
    policy: Arc<Policy>,
    /// Keeps it up to date.
    follow: Option<Follow>,
    mirror: Arc<Mirror>,
    door: Door,
    dialer: Dialer,
    plain_health: Option<TcpListener>,
    enroll: Option<TcpListener>,
    admin: Vec<AdminSocket>,
    janus_urls: watch::Sender<Vec<String>>,
}

/// Takes changes over while a server runs; cheap to clone.
#[derive(Clone)]
pub struct Reload {
    identity: Identity,
    revoked: Arc<Revoked>,
    settings: Settings,
    janus_urls: watch::Sender<Vec<String>>,
}

impl Reload {
    /// Reads certificate, key and CA again and takes `janus_urls` of `settings`. What can't be used changes nothing; what
    /// takes a restart is said in the log. Reads files.
    pub fn apply(&self, settings: Result<Settings, String>) {
        program::reload_identity(&self.identity);
        // Of an authority that isn't believed any more.
        self.revoked.sign_anew();
        let checked = settings.and_then(|settings| {
            settings.check().map_err(|error| error.to_string())?;
            refuse_network(&settings.janus_urls, &self.settings.image_path)
                .map_err(|error| error.to_string())?;
            Ok(settings)
        });
        let settings = match checked {
            Ok(settings) => settings,
            Err(error) => return tracing::error!(error, "the old settings stay in use"),
        };
        self.janus_urls.send_if_modified(|known| {
            let is_new = *known != settings.janus_urls;
            if is_new {
                tracing::info!(janus_urls = ?settings.janus_urls, "janus_urls were read again");
                known.clone_from(&settings.janus_urls);
            }
            is_new
        });
        let others = changed_keys(&self.settings, &settings, &["janus_urls"]);
        if !others.is_empty() {
            tracing::warn!(keys = others.join(", "), "changed settings that need a restart");
        }
    }
}

impl Server {
    /// Opens store and listener.
    ///
    /// # Errors
    /// As [`ServeError`] says.
    pub async fn start(settings: Settings) -> Result<Self, ServeError> {
        let identity =
            Identity::load_with(&settings.cert, &settings.key, &settings.ca, &settings.pki)?;
        name(&identity)?;
        let listener = bind("listen", &settings.listen).await?;
        let plain_health = bind_unless_empty("health_listen", &settings.health_listen).await?;
        let enroll = bind_unless_empty("enroll.listen", &settings.enroll.listen).await?;
        if enroll.is_some()
            && let Err(error) = Authority::open(&settings.enroll.ca)
        {
            // It is read again for each machine: no reason to take no backups.
            tracing::error!(%error, "no machine can enrol or renew its certificate here until this is mended");
        }
        let stored = settings.clone();
        let opened = tokio::task::spawn_blocking(move || open_store(&stored)).await;
        let store = opened.map_err(|error| ServeError::Wiring(error.to_string()))??;
        let (door, dialer) =
            (Door::Tls(listener, identity.clone()), Arc::new(identity.clone()) as Dialer);
        let server = Self::over(store, settings, identity, door, dialer)?;
        let admin = bind_admin(&server.settings);
        Ok(Self { plain_health, enroll, admin, ..server })
    }

    /// A server whose connections come through `door` and are made by `dialer`. Opens the store, which blocks.
    ///
    /// # Errors
    /// As [`ServeError`] says.
    pub fn between(
        settings: Settings,
        identity: Identity,
        door: Door,
        dialer: Dialer,
    ) -> Result<Self, ServeError> {
        Self::over(open_store(&settings)?, settings, identity, door, dialer)
    }

    fn over(
        (store, machines): OpenedStore,
        settings: Settings,
        identity: Identity,
        door: Door,
        dialer: Dialer,
    ) -> Result<Self, ServeError> {
        let (id, lease) = (name(&identity)?, Duration::from_secs(settings.lease_seconds));
        let runs = Runs::new(store, machines, lease)
            .with_new_chains(settings.new_chains())
            .with_limits(runs::Limits::of(&settings));
        let audit = Audit::new(runs.store().storage().clone(), &settings.audit_folder());
        let runs = runs.with_audit(audit).locking(settings.retention.lock_days);
        let runs = Arc::new(runs);
        let revoked = Arc::new(Revoked::open(runs.store(), identity.clone())?);
        let write_only = settings.write_only().map_err(wiring)?;
        let policy = Arc::new(Policy::default());
        let follow = Follow::new(settings.policy.clone(), write_only, policy.clone())?;
        runs.look_for_missing();
        let mirror = Arc::new(Mirror::new(runs.clone(), space::reserve(&settings)));
        let janus_urls = watch::Sender::new(settings.janus_urls.clone());
        let (plain_health, enroll, admin) = (None, None, Vec::new());
        Ok(Self {
            settings,
            identity,
            id,
            runs,
            revoked,
            policy,
            follow: Some(follow),
            mirror,
            door,
            dialer,
            plain_health,
            enroll,
            admin,
            janus_urls,
        })
    }

    /// Its runs.
    pub fn runs(&self) -> &Arc<Runs> {
        &self.runs
    }

    /// Takes changes over while the server runs.
    pub fn reload(&self) -> Reload {
        let (identity, settings) = (self.identity.clone(), self.settings.clone());
        let revoked = self.revoked.clone();
        Reload { identity, revoked, settings, janus_urls: self.janus_urls.clone() }
    }

    /// The address that was bound.
    ///
    /// # Errors
    /// As the system says.
    pub fn address(&self) -> std::io::Result<std::net::SocketAddr> {
        self.door.address()
    }

    /// Serves until `shutdown`, then drains and ends.
    ///
    /// # Errors
    /// When the wiring fails.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), ServeError> {
        let (health, health_service) = health().await;
        let is_low = watch::Sender::new(is_low(&self.runs, space::reserve(&self.settings)).await);
        set_all(&health, ServingStatus::Serving).await;
        let name = self.id.to_string();
        let urls = self.settings.urls.clone();
        let here = pb::ServerAddresses { server_id: name.clone(), urls };
        let (runs, mirror) = (self.runs.clone(), self.mirror.clone());
        let tables = Tables::new(runs.clone(), mirror.clone(), name.clone());
        let restore = Restore::new(runs, mirror, name.clone());
        let write_only = self.settings.write_only().map_err(wiring)?;
        let restore = restore.with_write_only(write_only);
        let restore = Arc::new(restore);
        let plain = Routes::new(health_service.clone());
        let routes = Routes::new(health_service)
            .add_service(
                BackupServiceServer::new(Backup::new(self.runs.clone(), here.clone()))
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .max_encoding_message_size(MAX_MESSAGE_BYTES),
            )
            .add_service(
                RestoreServiceServer::from_arc(restore.clone())
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .max_encoding_message_size(MAX_MESSAGE_BYTES),
            )
            .add_service(
                TableServiceServer::new(tables)
                    .max_decoding_message_size(MAX_MESSAGE_BYTES)
                    .max_encoding_message_size(MAX_MESSAGE_BYTES),
            )
            .add_service(CatalogServiceServer::new(Catalog::new(self.runs.clone(), here)))
            .add_service(ServerInfoServiceServer::new(Info::new(
                self.runs.clone(),
                name.clone(),
                self.revoked.known().clone(),
            )))
            .add_service(
                ProbeServiceServer::new(Probe::new(name.clone()))
                    .max_decoding_message_size(MAX_MESSAGE_BYTES),
            )
            .add_service(reflection().build_v1().map_err(wiring)?)
            .add_service(reflection().build_v1alpha().map_err(wiring)?)
            .prepare();
        let plan = Plan {
            streams: self.settings.max_bulk_streams as usize,
            streams_of_one_caller: self.settings.max_bulk_streams_per_caller as usize,
            stall: Duration::from_secs(self.settings.stall_seconds),
        };
        let (services, require_proof) = (Bounds::new(routes, plan), self.settings.require_proof);
        let (identity, policy) = (self.identity.clone(), self.policy.clone());
        let gate = Gate::new(services, identity, self.id.clone(), require_proof, policy)
            .map_err(wiring)?;
        let admin = Arc::new(
            Admin::new(self.runs.clone(), self.settings.clone())
                .with_revoked(self.revoked.clone())
                .with_policy(self.policy.clone()),
        );
        let mut tasks = self.tasks(&shutdown);
        if let Door::Tls(..) = self.door {
            tasks.spawn(program::follow_files(self.identity.clone(), shutdown.clone()));
        }
        for (name, rule) in &self.settings.replicate {
            let follow = self.replication().follow(name, rule, shutdown.clone());
            tasks.spawn(follow.map_err(wiring)?);
        }
        if let Some(listener) = self.enroll.take() {
            let config::Enroll { ca, urls, .. } = self.settings.enroll.clone();
            let found = [urls, self.settings.janus_urls.clone(), self.settings.urls.clone()];
            let urls = found.into_iter().find(|urls| !urls.is_empty()).unwrap_or_default();
            let valid = self.settings.enroll.valid();
            let (runs, tokens) = (self.runs.clone(), admin.tokens().clone());
            let enrollment = Enrollment::new(runs, tokens, ca, valid, urls);
            tasks.spawn(enrollment.serve(listener, self.identity.clone(), shutdown.clone()));
        }
        if let Some(follow) = self.follow.take() {
            tasks.spawn(follow.run(shutdown.clone()));
        }
        tasks.spawn(self.filler().run(shutdown.clone()));
        tasks.spawn(queue::follow(admin.clone(), shutdown.clone()));
        if let Some(schedule) =
            Schedule::of(&self.settings.prove, self.runs.clone()).map_err(wiring)?
        {
            tasks.spawn(schedule.follow(shutdown.clone()));
        }
        tasks.spawn(tell(health, is_low.subscribe(), shutdown.clone()));
        if self.settings.retention.automatic {
            let at = self.settings.retention.time_of_day().map_err(wiring)?;
            let is_low = is_low.subscribe();
            tasks.spawn(retention::follow(admin.retention().clone(), at, is_low, shutdown.clone()));
        }
        let reserve = space::reserve(&self.settings);
        tasks.spawn(space::watch(self.runs.clone(), reserve, is_low, shutdown.clone()));
        tasks.spawn(expire_handles(restore, shutdown.clone()));
        // Answered until the last call is over.
        let stop = CancellationToken::new();
        let _stop_on_drop = stop.clone().drop_guard();
        if let Some(listener) = self.plain_health {
            tasks.spawn(plain_health::serve(listener, plain, stop.clone()));
        }
        for socket in self.admin {
            tasks.spawn(socket.serve(admin.clone(), shutdown.clone()));
        }
        let limits = Limits {
            drain: Duration::from_secs(self.settings.drain_seconds),
            stall: plan.stall,
            ..Limits::default()
        };
        note(&self.runs, Action::ServerStart).await;
        let certificate_until = date(self.identity.expires().saturating_mul(1000));
        tracing::info!(server = name, address = ?self.door.address().ok(), certificate_until, "serving");
        self.door.serve(gate, limits, shutdown).await;
        stop.cancel();
        while tasks.join_next().await.is_some() {}
        note(&self.runs, Action::ServerStop).await;
        tracing::info!(server = name, "stopped");
        Ok(())
    }

    fn filler(&self) -> Filler {
        Filler {
            runs: self.runs.clone(),
            own: self.id.clone(),
            dialer: self.dialer.clone(),
            janus_urls: self.janus_urls.subscribe(),
            settings: self.settings.fill.clone(),
        }
    }

    fn replication(&self) -> Replication {
        Replication {
            runs: self.runs.clone(),
            own: self.id.clone(),
            dialer: self.dialer.clone(),
            janus_urls: self.janus_urls.subscribe(),
        }
    }

    /// The background check of all images, unless it is off.
    fn scrub(&self) -> Option<Scrub> {
        let bytes_per_second = self.settings.scrub_mib_per_second.saturating_mul(1 << 20);
        let again = Duration::from_secs(self.settings.scrub_days.saturating_mul(86_400));
        let runs = self.runs.clone();
        (bytes_per_second > 0).then_some(Scrub { runs, bytes_per_second, again })
    }

    /// Reports to every janus, the end of old runs, the background check, and the mirror.
    fn tasks(&self, shutdown: &CancellationToken) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        let reporter = Reporter {
            runs: self.runs.clone(),
            server: self.id.to_string(),
            identity: self.identity.clone(),
            revoked: self.revoked.clone(),
            policy: self.policy.clone(),
            urls: self.settings.urls.clone(),
            settings: pb::SharedSettings {
                image_path: self.settings.image_path.display().to_string(),
                prefer_vhdx: self.settings.prefer_vhdx,
                separate_folders_by_user: self.settings.separate_folders_by_user,
            },
            refresh: Duration::from_secs(self.settings.refresh_seconds),
        };
        let urls = self.janus_urls.subscribe();
        tasks.spawn(reporter.follow(urls, self.dialer.clone(), shutdown.clone()));
        if self.settings.mirror_tables {
            let every = Duration::from_secs(self.settings.refresh_seconds);
            let (mirror, urls) = (self.mirror.clone(), self.janus_urls.subscribe());
            let (id, dialer) = (self.id.clone(), self.dialer.clone());
            tasks.spawn(mirror::follow::follow(mirror, id, urls, dialer, every, shutdown.clone()));
        }
        let keep = Duration::from_secs(self.settings.session_keep_days.saturating_mul(86_400));
        if let Some(scrub) = self.scrub() {
            tasks.spawn(scrub.run(shutdown.clone()));
        }
        let (runs, shutdown) = (self.runs.clone(), shutdown.clone());
        tasks.spawn(async move {
            while shutdown.run_until_cancelled(tokio::time::sleep(EXPIRY_ROUND)).await.is_some() {
                let runs = runs.clone();
                let round = move || {
                    runs.expire(keep);
                    runs.save_clock();
                    runs.machines().iter().for_each(|machine| runs.protect_files(machine));
                    tell_head(&runs);
                };
                let _ = crate::blocking(round).await;
            }
        });
        tasks
    }
}

/// Records what becomes of the server itself, and tells the log how far that is.
async fn note(runs: &Arc<Runs>, what: Action) {
    let (runs, version) = (runs.clone(), env!("CARGO_PKG_VERSION"));
    let record = move || {
        runs.note(&Who::server(), Event::new(what).noting(format!("version {version}")));
        tell_head(&runs);
    };
    let _ = crate::blocking(record).await;
}

/// Writes what waits for the audit log, and its newest hash into the other log: who keeps that elsewhere notices a cut end.
fn tell_head(runs: &Runs) {
    let Some(audit) = runs.audit() else { return };
    // What can't be written was told.
    if audit.flush().is_ok()
        && let Ok(head) = audit.head()
    {
        tracing::info!(records = head.number, head = %head.hash, "audit log");
    }
}

/// Closes handles of restores that nobody goes on with.
async fn expire_handles(restore: Arc<Restore>, shutdown: CancellationToken) {
    while shutdown.run_until_cancelled(tokio::time::sleep(HANDLE_LEASE / 20)).await.is_some() {
        let restore = restore.clone();
        // What it can't keep was told.
        let _ = crate::blocking(move || restore.expire()).await;
    }
}

pub(crate) fn name(identity: &Identity) -> Result<ServerId, ServeError> {
    match &identity.principal().role {
        Role::Server(id) => Ok(id.clone()),
        role => Err(ServeError::WrongRole { role: role.to_string() }),
    }
}

type OpenedStore = (Store, HashMap<MachineKey, MachineState>);

fn open_store(settings: &Settings) -> Result<OpenedStore, ServeError> {
    let path = &settings.image_path;
    refuse_network(&settings.janus_urls, path)?;
    Ok(Store::open(path, settings.separate_folders_by_user)?)
}

/// Of several servers each must have its own disk; a single one may know what it does.
/// What can't be looked at is for the store to explain.
fn refuse_network(janus_urls: &[String], path: &Path) -> Result<(), ServeError> {
    match storage::network_file_system(path) {
        Ok(Some(kind)) if !janus_urls.is_empty() => {
            Err(ServeError::NetworkFileSystem { path: path.into(), kind })
        }
        _ => Ok(()),
    }
}

/// Whether space is low already.
async fn is_low(runs: &Arc<Runs>, reserve: Size) -> bool {
    let runs = runs.clone();
    let asked = crate::blocking(move || Space::ask(runs.store(), reserve)).await;
    asked.ok().flatten().is_some_and(|space| space.is_low(false))
}

/// The only one who changes what health says: no backups while space is low, nothing from the drain on.
async fn tell(
    health: HealthReporter,
    mut is_low: watch::Receiver<bool>,
    shutdown: CancellationToken,
) {
    while !shutdown.is_cancelled() {
        let backups = match *is_low.borrow_and_update() {
            true => ServingStatus::NotServing,
            false => ServingStatus::Serving,
        };
        health.set_service_status(pb::backup_service_server::SERVICE_NAME, backups).await;
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            changed = is_low.changed() => if changed.is_err() {
                shutdown.cancelled().await;
            }
        }
    }
    set_all(&health, ServingStatus::NotServing).await;
}

/// Backups are worth more than commands: a server without a socket serves, and says so.
fn bind_admin(settings: &Settings) -> Vec<AdminSocket> {
    let own = AdminSocket::bind(&settings.image_path);
    let told = |error: &_| {
        tracing::error!(%error, "no admin socket in the image path: commands work while the server doesn't run");
    };
    let path = &settings.admin_socket;
    let accounts = (!path.as_os_str().is_empty()).then(|| AdminSocket::bind_for_accounts(path));
    let failed = |error: &_| {
        tracing::error!(path = %path.display(), %error, "admin_socket can't be made: commands are for root alone");
    };
    let accounts = accounts.and_then(|bound| bound.inspect_err(failed).ok());
    own.inspect_err(told).into_iter().chain(accounts).collect()
}

async fn bind(key: &'static str, address: &str) -> Result<TcpListener, ServeError> {
    let failed = |source| ServeError::Listen { key, address: address.to_owned(), source };
    TcpListener::bind(address).await.map_err(failed)
}

async fn bind_unless_empty(
    key: &'static str,
    address: &str,
) -> Result<Option<TcpListener>, ServeError> {
    match address {
        "" => Ok(None),
        address => bind(key, address).await.map(Some),
    }
}

fn wiring(error: impl std::fmt::Display) -> ServeError {
    ServeError::Wiring(error.to_string())
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}
