//! Answering on the control socket.

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path as Segment, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use tokio::net::{UnixListener, UnixStream};

use super::{BitmapChange, BitmapInfo, JobInfo, NewBackup, Upkeep};
use super::{
    Detach, DiskInfo, DiskStat, Grow, Grown, NewDisk, ProcessInfo, SnapshotInfo, SnapshotName, XenDevice,
};
use crate::{Fault, FaultKind, Supervisor};

/// The control socket of this process. Its file goes when it is dropped.
pub struct ControlSocket {
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Makes the socket, for this user alone, in place of one that nobody answers on.
    ///
    /// # Errors
    /// `AddrInUse` where somebody answers on it, and whatever the system says.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let listener = match std::os::unix::net::UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_dead(path) => {
                fs::remove_file(path)?;
                std::os::unix::net::UnixListener::bind(path)
            }
            other => other,
        }?;
        let socket = ControlSocket { listener, path: path.to_owned() };
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        socket.listener.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Answers until `until` is done. Connections that are being answered then are finished.
    ///
    /// # Errors
    /// The socket cannot be listened on.
    pub async fn serve(
        &self,
        supervisor: Arc<Supervisor>,
        until: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let listener = Guarded(UnixListener::from_std(self.listener.try_clone()?)?);
        axum::serve(listener, router(supervisor)).with_graceful_shutdown(until).await
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!("{}: {error}", self.path.display());
        }
    }
}

fn is_dead(path: &Path) -> bool {
    BlockingStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// A listener that hangs up on everybody but this user and root, whatever the socket's permissions say.
struct Guarded(UnixListener);

impl axum::serve::Listener for Guarded {
    type Io = UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let own = rustix::process::geteuid().as_raw();
        loop {
            match self.0.accept().await {
                Ok((stream, address)) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == own || peer.uid() == 0 => return (stream, address),
                    Ok(peer) => tracing::warn!("the control socket is not for user {}", peer.uid()),
                    Err(error) => tracing::warn!("a client of the control socket cannot be told: {error}"),
                },
                Err(error) => {
                    // Out of descriptors, most likely: others may give some back.
                    tracing::warn!("the control socket: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

type Answer<T> = Result<Json<T>, Fault>;
type Asked<T> = Result<Json<T>, JsonRejection>;
type Server = State<Arc<Supervisor>>;

fn router(supervisor: Arc<Supervisor>) -> Router {
    Router::new()
        .route("/v1/process", get(process))
        .route("/v1/xen", get(xen))
        .route("/v1/disks", get(list).post(add))
        .route("/v1/disks/{name}", get(stat))
        .route("/v1/disks/{name}/grow", post(grow))
        .route("/v1/disks/{name}/detach", post(detach))
        .route("/v1/disks/{name}/bitmaps", get(bitmaps).post(change_bitmaps))
        .route("/v1/disks/{name}/backup", post(backup))
        .route("/v1/disks/{name}/flatten", post(flatten))
        .route("/v1/disks/{name}/commit", post(commit))
        .route("/v1/disks/{name}/compact", post(compact))
        .route("/v1/jobs", get(jobs))
        .route("/v1/jobs/{id}", get(job))
        .route("/v1/jobs/{id}/cancel", post(cancel_job))
        .route("/v1/disks/{name}/snapshots", get(snapshots).post(create_snapshot))
        .route("/v1/disks/{name}/snapshots/apply", post(apply_snapshot))
        .route("/v1/disks/{name}/snapshots/delete", post(delete_snapshot))
        .fallback(async || {
            Fault::new(FaultKind::Unknown, "there is no such resource: docs/control.md lists them")
        })
        .method_not_allowed_fallback(async || {
            Fault::new(FaultKind::Invalid, "the resource has no such method")
        })
        .with_state(supervisor)
}

async fn process(State(supervisor): Server) -> Answer<ProcessInfo> {
    Ok(Json(supervisor.process()))
}

async fn list(State(supervisor): Server) -> Answer<Vec<DiskInfo>> {
    blocking(move || Ok(supervisor.list())).await
}

async fn stat(State(supervisor): Server, Segment(name): Segment<String>) -> Answer<DiskStat> {
    blocking(move || supervisor.stat(&name)).await
}

async fn xen(State(supervisor): Server) -> Answer<Option<Vec<XenDevice>>> {
    blocking(move || Ok(supervisor.xen())).await
}

async fn add(State(supervisor): Server, disk: Asked<NewDisk>) -> Answer<DiskInfo> {
    let disk = body(disk)?;
    blocking(move || supervisor.add(disk)).await
}

async fn grow(State(supervisor): Server, Segment(name): Segment<String>, to: Asked<Grow>) -> Answer<Grown> {
    let to = body(to)?;
    blocking(move || supervisor.grow(&name, to)).await
}

async fn detach(State(supervisor): Server, Segment(name): Segment<String>, how: Asked<Detach>) -> Answer<()> {
    let how = body(how)?;
    blocking(move || supervisor.detach(&name, how)).await
}

async fn bitmaps(State(supervisor): Server, Segment(name): Segment<String>) -> Answer<Vec<BitmapInfo>> {
    blocking(move || supervisor.bitmaps(&name)).await
}

async fn change_bitmaps(
    State(supervisor): Server,
    Segment(name): Segment<String>,
    change: Asked<BitmapChange>,
) -> Answer<Vec<BitmapInfo>> {
    let change = body(change)?;
    blocking(move || supervisor.change_bitmaps(&name, &change)).await
}

async fn backup(
    State(supervisor): Server,
    Segment(name): Segment<String>,
    backup: Asked<NewBackup>,
) -> Answer<JobInfo> {
    let backup = body(backup)?;
    blocking(move || supervisor.backup(&name, backup)).await
}

async fn flatten(
    State(supervisor): Server,
    Segment(name): Segment<String>,
    how: Asked<Upkeep>,
) -> Answer<JobInfo> {
    let how = body(how)?;
    blocking(move || supervisor.flatten(&name, how)).await
}

async fn commit(
    State(supervisor): Server,
    Segment(name): Segment<String>,
    how: Asked<Upkeep>,
) -> Answer<JobInfo> {
    let how = body(how)?;
    blocking(move || supervisor.commit(&name, how)).await
}

async fn compact(
    State(supervisor): Server,
    Segment(name): Segment<String>,
    how: Asked<Upkeep>,
) -> Answer<JobInfo> {
    let how = body(how)?;
    blocking(move || supervisor.compact(&name, how)).await
}

async fn jobs(State(supervisor): Server) -> Answer<Vec<JobInfo>> {
    Ok(Json(supervisor.jobs()))
}

async fn job(State(supervisor): Server, Segment(id): Segment<String>) -> Answer<JobInfo> {
    supervisor.job(&id).map(Json)
}

async fn cancel_job(State(supervisor): Server, Segment(id): Segment<String>) -> Answer<JobInfo> {
    supervisor.cancel_job(&id).map(Json)
}

async fn snapshots(State(supervisor): Server, Segment(name): Segment<String>) -> Answer<Vec<SnapshotInfo>> {
    blocking(move || supervisor.snapshots(&name)).await
}

async fn create_snapshot(
    State(supervisor): Server,
    Segment(name): Segment<String>,
    which: Asked<SnapshotName>,
) -> Answer<SnapshotInfo> {
    let which = body(which)?;
    blocking(move || supervisor.create_snapshot(&name, &which.snapshot)).await
}

async fn apply_snapshot(
    State(supervisor): Server,
    Segment(name): Segment<String>,
    which: Asked<SnapshotName>,
) -> Answer<()> {
    let which = body(which)?;
    blocking(move || supervisor.apply_snapshot(&name, &which.snapshot)).await
}

async fn delete_snapshot(
    State(supervisor): Server,
    Segment(name): Segment<String>,
    which: Asked<SnapshotName>,
) -> Answer<()> {
    let which = body(which)?;
    blocking(move || supervisor.delete_snapshot(&name, &which.snapshot)).await
}

fn body<T>(asked: Asked<T>) -> Result<T, Fault> {
    let Json(value) = asked.map_err(|rejection| Fault::new(FaultKind::Invalid, rejection.body_text()))?;
    Ok(value)
}

/// Runs what may block (files, leases, stopping) away from the thread that answers.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Fault> + Send + 'static) -> Answer<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Fault::failed("the operation broke down", error))).map(Json)
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status = match self.kind {
            FaultKind::Unknown => StatusCode::NOT_FOUND,
            FaultKind::Exists | FaultKind::Busy => StatusCode::CONFLICT,
            FaultKind::Invalid => StatusCode::BAD_REQUEST,
            FaultKind::Limit => StatusCode::TOO_MANY_REQUESTS,
            FaultKind::Stopping => StatusCode::SERVICE_UNAVAILABLE,
            FaultKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self)).into_response()
    }
}
