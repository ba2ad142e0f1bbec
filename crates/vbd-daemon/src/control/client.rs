//! Asking a serving process, one request a connection. Blocks.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{BitmapChange, BitmapInfo, JobInfo, NewBackup, Upkeep};
use super::{
    Detach, DiskInfo, DiskStat, Grow, Grown, NewDisk, ProcessInfo, SnapshotInfo, SnapshotName, XenDevice,
};
use crate::{Fault, FaultKind};

/// How long an answer may take: stopping a disk is the slowest, and it is bounded by the server.
const ANSWER: Duration = Duration::from_secs(60);
/// The longest answer that is read, in bytes: several thousand disks with 128 queues each.
const LONGEST: usize = 1 << 30;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error("{}: no vbd answers there ({source}); `vbd list` shows those that do", .socket.display())]
    Unreachable {
        /// The control socket.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The conversation broke off, took too long or made no sense.
    #[error("{}: {reason}", .socket.display())]
    Protocol {
        /// The control socket.
        socket: PathBuf,
        /// What happened.
        reason: String,
    },
    /// The server refused.
    #[error(transparent)]
    Refused(#[from] Fault),
}

/// A client of one control socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the socket at this path. Nothing is asked yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Client { socket: socket.into() }
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// About the process.
    ///
    /// # Errors
    /// See [`ClientError`]; so for all that follow.
    pub fn process(&self) -> Result<ProcessInfo, ClientError> {
        self.ask(Method::GET, "/v1/process", None::<&()>)
    }

    /// All its disks.
    pub fn disks(&self) -> Result<Vec<DiskInfo>, ClientError> {
        self.ask(Method::GET, "/v1/disks", None::<&()>)
    }

    /// The devices of Xen's domains; none where the process does not serve any domain.
    pub fn xen(&self) -> Result<Option<Vec<XenDevice>>, ClientError> {
        self.ask(Method::GET, "/v1/xen", None::<&()>)
    }

    /// One disk with its counters.
    pub fn stat(&self, name: &str) -> Result<DiskStat, ClientError> {
        self.ask(Method::GET, &format!("/v1/disks/{}", encode(name)), None::<&()>)
    }

    /// Makes a disk larger.
    pub fn grow(&self, name: &str, grow: Grow) -> Result<Grown, ClientError> {
        self.ask(Method::POST, &format!("/v1/disks/{}/grow", encode(name)), Some(&grow))
    }

    /// The snapshots inside a disk's image.
    pub fn snapshots(&self, name: &str) -> Result<Vec<SnapshotInfo>, ClientError> {
        self.ask(Method::GET, &format!("/v1/disks/{}/snapshots", encode(name)), None::<&()>)
    }

    /// Keeps a disk's content as it is now.
    pub fn create_snapshot(&self, name: &str, snapshot: &str) -> Result<SnapshotInfo, ClientError> {
        let which = SnapshotName { snapshot: snapshot.to_owned() };
        self.ask(Method::POST, &format!("/v1/disks/{}/snapshots", encode(name)), Some(&which))
    }

    /// Gives a disk the content that it had then.
    pub fn apply_snapshot(&self, name: &str, snapshot: &str) -> Result<(), ClientError> {
        let which = SnapshotName { snapshot: snapshot.to_owned() };
        self.ask(Method::POST, &format!("/v1/disks/{}/snapshots/apply", encode(name)), Some(&which))
    }

    /// Forgets a snapshot.
    pub fn delete_snapshot(&self, name: &str, snapshot: &str) -> Result<(), ClientError> {
        let which = SnapshotName { snapshot: snapshot.to_owned() };
        self.ask(Method::POST, &format!("/v1/disks/{}/snapshots/delete", encode(name)), Some(&which))
    }

    /// Serves another disk.
    pub fn add(&self, disk: &NewDisk) -> Result<DiskInfo, ClientError> {
        self.ask(Method::POST, "/v1/disks", Some(disk))
    }

    /// Ends serving a disk: what it has in work is finished and made durable.
    pub fn detach(&self, name: &str, detach: Detach) -> Result<(), ClientError> {
        self.ask(Method::POST, &format!("/v1/disks/{}/detach", encode(name)), Some(&detach))
    }

    /// The bitmaps of a disk.
    pub fn bitmaps(&self, name: &str) -> Result<Vec<BitmapInfo>, ClientError> {
        self.ask(Method::GET, &format!("/v1/disks/{}/bitmaps", encode(name)), None::<&()>)
    }

    /// Changes the bitmaps of a disk, and gives those there are then.
    pub fn change_bitmaps(&self, name: &str, change: &BitmapChange) -> Result<Vec<BitmapInfo>, ClientError> {
        self.ask(Method::POST, &format!("/v1/disks/{}/bitmaps", encode(name)), Some(change))
    }

    /// Begins a backup of a disk.
    pub fn backup(&self, name: &str, backup: &NewBackup) -> Result<JobInfo, ClientError> {
        self.ask(Method::POST, &format!("/v1/disks/{}/backup", encode(name)), Some(backup))
    }

    /// Begins to copy into a disk's image all that it reads from others.
    pub fn flatten(&self, name: &str, how: Upkeep) -> Result<JobInfo, ClientError> {
        self.ask(Method::POST, &format!("/v1/disks/{}/flatten", encode(name)), Some(&how))
    }

    /// Begins to write what a disk's image holds to the one that it stands on.
    pub fn commit(&self, name: &str, how: Upkeep) -> Result<JobInfo, ClientError> {
        self.ask(Method::POST, &format!("/v1/disks/{}/commit", encode(name)), Some(&how))
    }

    /// Begins to make the file of a disk's image as short as it can be.
    pub fn compact(&self, name: &str, how: Upkeep) -> Result<JobInfo, ClientError> {
        self.ask(Method::POST, &format!("/v1/disks/{}/compact", encode(name)), Some(&how))
    }

    /// The jobs that run, and the last that have ended.
    pub fn jobs(&self) -> Result<Vec<JobInfo>, ClientError> {
        self.ask(Method::GET, "/v1/jobs", None::<&()>)
    }

    /// One job.
    pub fn job(&self, id: u64) -> Result<JobInfo, ClientError> {
        self.ask(Method::GET, &format!("/v1/jobs/{id}"), None::<&()>)
    }

    /// Asks a job to stop.
    pub fn cancel_job(&self, id: u64) -> Result<JobInfo, ClientError> {
        self.ask(Method::POST, &format!("/v1/jobs/{id}/cancel"), None::<&()>)
    }

    fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| self.protocol(format!("no runtime: {error}")))?;
        runtime.block_on(async {
            let answer = tokio::time::timeout(ANSWER, self.exchange(method, path, body));
            answer.await.unwrap_or_else(|_| Err(self.protocol(format!("no answer within {ANSWER:?}"))))
        })
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let broken = |error: hyper::Error| self.protocol(format!("the conversation broke off: {error}"));
        let body =
            body.map(serde_json::to_vec).transpose().map_err(|error| self.protocol(error.to_string()))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "vbd")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.unwrap_or_default())))
            .map_err(|error| self.protocol(error.to_string()))?;

        let stream = UnixStream::connect(&self.socket).await;
        let stream =
            stream.map_err(|source| ClientError::Unreachable { socket: self.socket.clone(), source })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let connection = tokio::spawn(connection);
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LONGEST).collect().await;
        let body = body.map_err(|error| self.protocol(error.to_string()))?.to_bytes();
        connection.abort();
        if status.is_success() {
            let body = if status == StatusCode::NO_CONTENT { b"null" } else { &body[..] };
            return serde_json::from_slice(body)
                .map_err(|error| self.protocol(format!("an answer of another version: {error}")));
        }
        Err(ClientError::Refused(serde_json::from_slice(&body).unwrap_or_else(|_| {
            let text = String::from_utf8_lossy(&body);
            Fault::new(FaultKind::Failed, format!("{}: {status}: {text}", self.socket.display()))
        })))
    }

    fn protocol(&self, reason: String) -> ClientError {
        ClientError::Protocol { socket: self.socket.clone(), reason }
    }
}

/// A name as a segment of a path (RFC 3986, 2.1).
fn encode(name: &str) -> String {
    let mut segment = String::with_capacity(name.len());
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                segment.push(char::from(byte))
            }
            _ => segment.push_str(&format!("%{byte:02X}")),
        }
    }
    segment
}
