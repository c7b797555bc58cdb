//! What a call is, by its path alone.

use std::collections::HashMap;

use prost::Message;
use prost_types::FileDescriptorSet;

/// How janus treats a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// Answered here.
    Local,
    /// Answered here for all servers; pinned, by the server.
    Merged,
    /// Start of a run.
    Start,
    /// Forwarded; one request message, so it can be kept and sent again.
    Unary {
        /// The answer is a stream.
        bulk: bool,
    },
    /// Forwarded; the request may be of any length.
    Stream,
    /// Nothing this janus knows.
    Unknown,
}

const START: &str = "/janus.v1.BackupService/StartBackup";
const PACKAGE: &str = "/janus.v1.";
const MERGED: [&str; 2] = ["/janus.v1.CatalogService/", "/janus.v1.ServerInfoService/"];
const LOCAL: [&str; 5] = [
    "/janus.v1.ReportService/",
    "/janus.v1.MaintenanceService/",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/",
    "/grpc.reflection.v1alpha.ServerReflection/",
];

/// All methods of the contract.
#[derive(Debug, Clone)]
pub(crate) struct Routes(HashMap<String, Route>);

impl Routes {
    /// From the encoded descriptors of the package. What can't be read is treated as a stream: slower, never wrong.
    pub fn new(descriptors: &[u8]) -> Self {
        let mut routes = HashMap::new();
        let files = FileDescriptorSet::decode(descriptors).map(|set| set.file).unwrap_or_default();
        for file in files {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    let route = match method.client_streaming() {
                        true => Route::Stream,
                        false => Route::Unary { bulk: method.server_streaming() },
                    };
                    routes.insert(path, route);
                }
            }
        }
        Self(routes)
    }

    /// The route of a path. Methods of the package that a newer client knows and this janus doesn't are forwarded too.
    pub fn of(&self, path: &str) -> Route {
        if path == START {
            return Route::Start;
        }
        if LOCAL.iter().any(|prefix| path.starts_with(prefix)) {
            return Route::Local;
        }
        if MERGED.iter().any(|prefix| path.starts_with(prefix)) {
            return Route::Merged;
        }
        match self.0.get(path) {
            Some(route) => *route,
            None if path.starts_with(PACKAGE) => Route::Stream,
            None => Route::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use janus_proto::pb::DESCRIPTORS;

    use super::*;

    #[test]
    fn every_kind_of_call_has_its_route() {
        let routes = Routes::new(DESCRIPTORS);
        for (path, route) in [
            ("/janus.v1.BackupService/StartBackup", Route::Start),
            ("/janus.v1.BackupService/WriteBlocks", Route::Stream),
            ("/janus.v1.BackupService/CommitBackup", Route::Unary { bulk: false }),
            ("/janus.v1.RestoreService/ReadBlocks", Route::Unary { bulk: true }),
            ("/janus.v1.CatalogService/ListSnapshots", Route::Merged),
            ("/janus.v1.ServerInfoService/GetServerInfo", Route::Merged),
            ("/janus.v1.ReportService/Report", Route::Local),
            ("/grpc.health.v1.Health/Watch", Route::Local),
            ("/janus.v1.BackupService/FromTheFuture", Route::Stream),
            ("/janus.v10.BackupService/StartBackup", Route::Unknown),
            ("/", Route::Unknown),
        ] {
            assert_eq!(routes.of(path), route, "{path}");
        }
    }
}
