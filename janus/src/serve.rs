//! Wiring: servers, services, listener, and an end in good order.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use janus_proto::{
    channel::{Dialer, Target},
    ids::ServerId,
    listener::{Door, Limits, Windows},
    pb, plain_health, plain_http, program,
    settings::changed_keys,
    show::date,
    tls::{Identity, Role, TlsError},
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::server::HealthReporter;
use tracing::{error, info, warn};

use crate::{
    alert,
    catalog::Catalog,
    config::{ConfigError, Settings},
    fleet::Fleet,
    health,
    info::Info,
    maintenance::Maintenance,
    metrics::{self, Figures},
    registry::Registry,
    report::Reports,
    router::Router,
    traffic::Latencies,
    view,
    wake::{self, Waker},
};

/// Between NOT_SERVING and the end of the streams that tell it.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// A line of 1 Gbit/s stays full up to a round trip of 33 ms, and 64 streams that flow have little in memory. Smaller pieces cost
/// nothing here: they go from one TLS connection into another by records of 16 KiB.
const WINDOWS: Windows =
    Windows { frame_bytes: 128 << 10, stream_bytes: 4 << 20, connection_bytes: 12 << 20 };

/// Why janus did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The certificate is of another role.
    #[error("the certificate says {role}: janus needs one of `janus-server pki issue janus`")]
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
    /// A setting that can't be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Wiring that can't fail for a contract that compiles.
    #[error("cannot start: {0}")]
    Wiring(String),
}

/// A janus that listens, but serves nothing yet.
pub struct Janus {
    settings: Settings,
    identity: Identity,
    id: ServerId,
    fleet: Fleet,
    door: Door,
    dialer: Dialer,
    metrics: Option<TcpListener>,
    health: Option<TcpListener>,
    targets: watch::Sender<Vec<Target>>,
}

/// Takes changes over while janus runs; cheap to clone.
#[derive(Debug, Clone)]
pub struct Reload {
    identity: Identity,
    settings: Settings,
    targets: watch::Sender<Vec<Target>>,
}

impl Reload {
    /// Reads certificate, key and CA again and takes `server_urls` of `settings`. What can't be used changes nothing; what
    /// takes a restart is said in the log. Reads files.
    pub fn apply(&self, settings: Result<Settings, String>) {
        program::reload_identity(&self.identity);
        let checked = settings.and_then(|settings| {
            settings
                .check()
                .and_then(|()| settings.targets())
                .map(|targets| (settings, targets))
                .map_err(|error| error.to_string())
        });
        let (settings, targets) = match checked {
            Ok(checked) => checked,
            Err(error) => return error!(error, "the old settings stay in use"),
        };
        self.targets.send_if_modified(|known| {
            let is_new = *known != targets;
            if is_new {
                info!(server_urls = ?settings.server_urls, "server_urls were read again");
                *known = targets;
            }
            is_new
        });
        let others = changed_keys(&self.settings, &settings, &["server_urls"]);
        if !others.is_empty() {
            warn!(keys = others.join(", "), "changed settings that need a restart");
        }
    }
}

impl Janus {
    /// Checks the settings and takes the address.
    ///
    /// # Errors
    /// As [`ServeError`] says.
    pub async fn start(settings: Settings) -> Result<Self, ServeError> {
        settings.check()?;
        let identity =
            Identity::load_with(&settings.cert, &settings.key, &settings.ca, &settings.pki)?;
        name(&identity)?;
        let listener = bind("listen", &settings.listen).await?;
        let metrics = bind_where_set("metrics_listen", &settings.metrics_listen).await?;
        let health = bind_where_set("health_listen", &settings.health_listen).await?;
        let (door, dialer) =
            (Door::Tls(listener, identity.clone()), Arc::new(identity.clone()) as Dialer);
        let janus = Self { metrics, health, ..Self::between(settings, identity, door, dialer)? };
        if !janus.settings.view_file.is_empty() {
            let file = PathBuf::from(&janus.settings.view_file);
            let known = tokio::task::spawn_blocking(move || view::load(&file)).await;
            janus.fleet.recall(known.map_err(wiring)?);
        }
        Ok(janus)
    }

    /// A janus whose connections come through `door` and are made by `dialer`.
    ///
    /// # Errors
    /// As [`ServeError`] says.
    pub fn between(
        settings: Settings,
        identity: Identity,
        door: Door,
        dialer: Dialer,
    ) -> Result<Self, ServeError> {
        settings.check()?;
        let id = name(&identity)?;
        let (targets, registry) = (settings.targets()?, Registry::new());
        let fleet = Fleet::new(&targets, settings.probe(), registry, settings.required());
        let targets = watch::Sender::new(targets);
        let (metrics, health) = (None, None);
        Ok(Self { settings, identity, id, fleet, door, dialer, metrics, health, targets })
    }

    /// Its servers, and what it knows of them.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// Takes changes over while janus runs.
    pub fn reload(&self) -> Reload {
        let (identity, settings) = (self.identity.clone(), self.settings.clone());
        Reload { identity, settings, targets: self.targets.clone() }
    }

    /// The address for Prometheus, where there is one.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref()?.local_addr().ok()
    }

    /// The address for health checks without TLS, where there is one.
    pub fn health_address(&self) -> Option<SocketAddr> {
        self.health.as_ref()?.local_addr().ok()
    }

    /// The address that was bound.
    ///
    /// # Errors
    /// As the system says.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.door.address()
    }

    /// Serves until `shutdown`, then drains and ends.
    ///
    /// # Errors
    /// When the wiring fails.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), ServeError> {
        let fleet = self.fleet;
        let drain_limit = Duration::from_secs(self.settings.drain_seconds);
        let (reporter, health_service) = janus_proto::health::health().await;
        let plain = Routes::new(health_service.clone());
        let alarms = self.settings.alarms()?;
        let info =
            Info::new(self.id.clone(), fleet.clone(), self.identity.clone(), Waker::new(&alarms));
        let local = Routes::new(health_service)
            .add_service(Catalog::service(fleet.clone()))
            .add_service(Reports::service(fleet.clone(), self.identity.clone()))
            .add_service(info.clone().service())
            .add_service(Maintenance::service(self.id.clone(), fleet.clone()))
            .add_service(reflection().build_v1().map_err(wiring)?)
            .add_service(reflection().build_v1alpha().map_err(wiring)?);
        // Servers are kept until the last call is over, so that calls in progress can end.
        let stop = CancellationToken::new();
        let _stop_on_drop = stop.clone().drop_guard();
        let mut tasks = JoinSet::new();
        let targets = self.targets.subscribe();
        let following =
            fleet.clone().follow(targets, self.dialer.clone(), drain_limit, stop.clone());
        tasks.spawn(following);
        tasks.spawn(wake::follow(alarms, shutdown.clone()));
        if let Door::Tls(..) = self.door {
            tasks.spawn(program::follow_files(self.identity.clone(), shutdown.clone()));
        }
        let (drain, latencies) = (CancellationToken::new(), Latencies::default());
        tasks.spawn(follow_health(fleet.clone(), reporter, shutdown.clone(), drain.clone()));
        if !self.settings.view_file.is_empty() {
            let file = PathBuf::from(&self.settings.view_file);
            tasks.spawn(view::keep(file, fleet.clone(), stop.clone()));
        }
        if let Some(health) = self.health {
            tasks.spawn(plain_health::serve(health, plain, stop.clone()));
        }
        for way in self.settings.alert_ways()? {
            let telling = alert::run(info.clone(), self.settings.alert_rule(), way, stop.clone());
            tasks.spawn(telling);
        }
        if let Some(metrics) = self.metrics {
            let overdue = self.settings.overdue();
            let figures = Figures { info, latencies: latencies.clone(), overdue };
            let routes = metrics::routes(figures);
            tasks.spawn(plain_http::serve(metrics, routes, "metrics", shutdown.clone()));
        }
        let (rule, bulk) = (self.settings.start_rule(), self.settings.bulk_limit());
        let router = Router::new(self.id.clone(), fleet, rule, bulk, local, drain, latencies);
        let unset = Limits::default();
        let limits = Limits {
            windows: WINDOWS,
            drain: drain_limit,
            stall: bulk.stall,
            // Beside the streams that a caller may have.
            max_calls_per_caller: unset.max_calls_per_caller.max(bulk.of_one_caller + 64),
            ..unset
        };
        let certificate_until = date(self.identity.expires().saturating_mul(1000));
        info!(janus = %self.id, address = ?self.door.address().ok(), certificate_until, "serving");
        self.door.serve(router, limits, shutdown).await;
        stop.cancel();
        while tasks.join_next().await.is_some() {}
        info!(janus = %self.id, "stopped");
        Ok(())
    }
}

/// Tells health until `shutdown`; then NOT_SERVING, and the end of all local streams.
async fn follow_health(
    fleet: Fleet,
    reporter: HealthReporter,
    shutdown: CancellationToken,
    drain: CancellationToken,
) {
    shutdown.run_until_cancelled(health::follow(fleet, reporter.clone())).await;
    health::not_serving(&reporter).await;
    sleep(LAST_WORDS).await;
    drain.cancel();
}

fn name(identity: &Identity) -> Result<ServerId, ServeError> {
    match &identity.principal().role {
        Role::Janus(id) => Ok(id.clone()),
        role => Err(ServeError::WrongRole { role: role.to_string() }),
    }
}

async fn bind_where_set(
    key: &'static str,
    address: &str,
) -> Result<Option<TcpListener>, ServeError> {
    if address.is_empty() { Ok(None) } else { bind(key, address).await.map(Some) }
}

async fn bind(key: &'static str, address: &str) -> Result<TcpListener, ServeError> {
    let failed = |source| ServeError::Listen { key, address: address.to_owned(), source };
    TcpListener::bind(address).await.map_err(failed)
}

fn wiring(error: impl std::fmt::Display) -> ServeError {
    ServeError::Wiring(error.to_string())
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}
