//! Wiring: servers, services, listener, and an end in good order.

use std::{net::SocketAddr, time::Duration};

use janus_proto::{
    ids::ServerId,
    listener::{self, Limits},
    pb,
    tls::{Identity, Role, TlsError},
};
use tokio::{net::TcpListener, task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic_health::server::HealthReporter;
use tracing::info;

use crate::{
    catalog::Catalog,
    config::{ConfigError, Settings},
    fleet::Fleet,
    health,
    info::Info,
    metrics,
    registry::Registry,
    report::Reports,
    router::Router,
};

/// Between NOT_SERVING and the end of the streams that tell it.
const LAST_WORDS: Duration = Duration::from_millis(100);

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
#[derive(Debug)]
pub struct Janus {
    settings: Settings,
    identity: Identity,
    id: ServerId,
    listener: TcpListener,
    metrics: Option<TcpListener>,
}

impl Janus {
    /// Checks the settings and takes the address.
    ///
    /// # Errors
    /// As [`ServeError`] says.
    pub async fn start(settings: Settings) -> Result<Self, ServeError> {
        settings.check()?;
        let identity = Identity::load(&settings.cert, &settings.key, &settings.ca)?;
        let id = match &identity.principal().role {
            Role::Janus(id) => id.clone(),
            role => return Err(ServeError::WrongRole { role: role.to_string() }),
        };
        let listener = bind("listen", &settings.listen).await?;
        let metrics = match settings.metrics_listen.as_str() {
            "" => None,
            address => Some(bind("metrics_listen", address).await?),
        };
        Ok(Self { settings, identity, id, listener, metrics })
    }

    /// The address for Prometheus, where there is one.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics.as_ref()?.local_addr().ok()
    }

    /// Who this is, to read its certificates again.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The address that was bound.
    ///
    /// # Errors
    /// As the system says.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown`, then drains and ends.
    ///
    /// # Errors
    /// When the wiring fails.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), ServeError> {
        let (settings, registry) = (&self.settings, Registry::new());
        let fleet =
            Fleet::new(settings.targets()?, settings.probe(), registry, settings.required());
        let (reporter, health_service) = tonic_health::server::health_reporter();
        let local = Routes::new(health_service)
            .add_service(Catalog::service(fleet.clone()))
            .add_service(Reports::service(fleet.clone()))
            .add_service(Info::service(self.id.clone(), fleet.clone()))
            .add_service(reflection().build_v1().map_err(wiring)?)
            .add_service(reflection().build_v1alpha().map_err(wiring)?);
        // Servers are kept until the last call is over, so that calls in progress can end.
        let stop = CancellationToken::new();
        let _stop_on_drop = stop.clone().drop_guard();
        let mut tasks = JoinSet::new();
        for upstream in fleet.servers() {
            tasks.spawn(upstream.clone().run(self.identity.clone(), stop.clone()));
        }
        let drain = CancellationToken::new();
        tasks.spawn(follow_health(fleet.clone(), reporter, shutdown.clone(), drain.clone()));
        if let Some(metrics) = self.metrics {
            let (fleet, shutdown, stop) = (fleet.clone(), shutdown.clone(), stop.clone());
            tasks.spawn(async move {
                let serving = metrics::serve(metrics, fleet, shutdown);
                // A reader that holds its connection may do so until the drain is over.
                if let Some(Err(error)) = stop.run_until_cancelled(serving).await {
                    tracing::error!(%error, "metrics are no longer served");
                }
            });
        }
        let router = Router::new(self.id.clone(), fleet, self.settings.start_rule(), local, drain);
        let limits =
            Limits { drain: Duration::from_secs(self.settings.drain_seconds), ..Limits::default() };
        info!(janus = %self.id, address = ?self.listener.local_addr().ok(), "serving");
        listener::serve(self.listener, self.identity, router, limits, shutdown).await;
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
