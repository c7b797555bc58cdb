//! Calls as a client of any language makes them, in the name of any certificate.

use std::{path::Path, time::Duration};

use janus_proto::{
    channel::{self, ConnectOptions, add_proof},
    pb::{
        self, backup_service_client::BackupServiceClient,
        catalog_service_client::CatalogServiceClient, restore_service_client::RestoreServiceClient,
        table_service_client::TableServiceClient,
    },
    proof::Statement,
    tls::Identity,
};
use tokio::runtime::Runtime;
use tonic::{Request, Status, transport::Channel};

pub struct Caller {
    runtime: Runtime,
    identity: Identity,
    channel: Channel,
}

impl Caller {
    pub fn new(url: &str, keys: &Path) -> Self {
        let path = |name: &str| keys.join(name);
        let identity = Identity::load(path("cert.pem"), path("key.pem"), path("ca.pem")).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let connecting = channel::connect(url, &identity, ConnectOptions::default());
        let channel = runtime.block_on(connecting).unwrap().channel;
        Self { runtime, identity, channel }
    }

    pub fn wait<T>(&self, call: impl Future<Output = T>) -> T {
        self.runtime.block_on(call)
    }

    pub fn backup(&self) -> BackupServiceClient<Channel> {
        BackupServiceClient::new(self.channel.clone())
    }

    pub fn restore(&self) -> RestoreServiceClient<Channel> {
        RestoreServiceClient::new(self.channel.clone())
    }

    pub fn catalog(&self) -> CatalogServiceClient<Channel> {
        CatalogServiceClient::new(self.channel.clone())
    }

    pub fn tables(&self) -> TableServiceClient<Channel> {
        TableServiceClient::new(self.channel.clone())
    }

    /// Tables of a machine that a server mirrors.
    pub fn mirrored(&self, server: &str, machine: &str) -> Result<Vec<pb::MirroredTable>, Status> {
        let message = pb::ListTablesRequest { machine: machine.to_owned(), ..Default::default() };
        let answer = self.wait(self.tables().list_tables(pinned(server, message)))?;
        Ok(answer.into_inner().tables)
    }

    /// All segments of a table, as a server tells them.
    pub fn table(
        &self,
        server: &str,
        snapshot: &str,
        since: &str,
    ) -> Result<(pb::TableStart, Vec<pb::TableSegment>), Status> {
        let message = pb::ReadTableRequest {
            snapshot_id: snapshot.to_owned(),
            since_snapshot_id: since.to_owned(),
            first_segment: 0,
        };
        let statement = Statement::table(&message);
        let mut request = pinned(server, message);
        add_proof(&mut request, &self.identity, &statement, Some(&server.parse().unwrap()));
        self.wait(async {
            let answers = self.tables().read_table(request).await?;
            let (mut answers, mut start, mut segments) = (answers.into_inner(), None, Vec::new());
            while let Some(answer) = answers.message().await? {
                start = start.or(answer.start);
                segments.extend(answer.segments);
            }
            Ok((start.unwrap(), segments))
        })
    }

    /// A handle on a snapshot, or on its table.
    pub fn open(&self, server: &str, snapshot: &str, table: bool) -> Result<String, Status> {
        let message = pb::OpenSnapshotRequest {
            snapshot_id: snapshot.to_owned(),
            table,
            ..Default::default()
        };
        let statement = Statement::open(&message);
        let mut request = pinned(server, message);
        add_proof(&mut request, &self.identity, &statement, Some(&server.parse().unwrap()));
        let answer = self.wait(self.restore().open_snapshot(request))?;
        Ok(answer.into_inner().handle)
    }
}

pub fn pinned<T>(server: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("janus-server", server.parse().unwrap());
    request.set_timeout(Duration::from_secs(30));
    request
}
