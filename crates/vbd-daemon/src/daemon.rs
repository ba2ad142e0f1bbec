//! A serving process, from start to clean stop.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use vbd_core::Disk;

use crate::config::{Config, DiskConfig, prepare_runtime_dir};
use crate::control::{ControlSocket, DiskInfo, find};
use crate::service::{self, Listener};
use crate::{Fault, FaultKind, Supervisor};

/// How long answers on the control socket may take after all has stopped.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);

/// What a process serves, and how.
pub struct Options {
    /// The disks and bounds.
    pub config: Config,
    /// Disks that are made already, with their entries of a configuration: their files are not opened.
    pub made: Vec<(DiskConfig, Arc<dyn Disk>)>,
    /// How reactors run.
    pub reactor: vbd_ring::Settings,
    /// NBD listeners of a service manager, besides those in `config`.
    pub listeners: Vec<Listener>,
    /// The control socket; `control-PID.sock` in the runtime directory if none is named.
    pub control: Option<PathBuf>,
    /// Files that are in use elsewhere now are accepted: a migration's destination starts before its source ends.
    pub incoming: bool,
    /// How long a clean stop may take.
    pub stop_within: Duration,
    /// Serving Xen's domains, if it is asked for.
    pub xen: Option<crate::xen::Options>,
}

/// Why nothing is served: everything that was found to be wrong.
#[derive(Debug)]
pub struct StartError(pub Vec<Fault>);

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, fault) in self.0.iter().enumerate() {
            write!(f, "{}{fault}", if index == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

impl std::error::Error for StartError {}

impl From<Fault> for StartError {
    fn from(fault: Fault) -> Self {
        StartError(vec![fault])
    }
}

/// A process that serves disks. Everything stops when it is dropped.
pub struct Daemon {
    // The fields are dropped in this order: nobody asks a supervisor that is gone.
    control: ControlSocket,
    signals: Signals,
    runtime: Runtime,
    supervisor: Arc<Supervisor>,
    ready: Vec<DiskInfo>,
    stop_within: Duration,
}

/// The signals that end a process.
struct Signals(Vec<Signal>);

impl Signals {
    /// SIGTERM, and the terminal's signals unless whoever started this had them ignored, as nohup(1) does.
    fn new() -> std::io::Result<Self> {
        let ignored = service::ignored_signals();
        let terminal = [SignalKind::interrupt(), SignalKind::hangup()];
        let heard = terminal.into_iter().filter(|kind| ignored >> (kind.as_raw_value() - 1) & 1 == 0);
        Ok(Signals(
            std::iter::once(SignalKind::terminate()).chain(heard).map(signal).collect::<Result<_, _>>()?,
        ))
    }

    async fn next(&mut self) {
        std::future::poll_fn(|context| {
            let came = self.0.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
            if came { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

impl Daemon {
    /// Starts everything, or nothing.
    ///
    /// # Errors
    /// All that is wrong with the disks and their front-ends.
    pub fn start(options: Options) -> Result<Self, StartError> {
        service::raise_open_files();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().thread_name("vbd-control").build();
        let runtime = runtime.map_err(|error| Fault::failed("the control side", error))?;
        // Before anything is made that a signal has to take away again.
        let signals = {
            let _inside = runtime.enter();
            Signals::new().map_err(|error| Fault::failed("the handlers of signals", error))?
        };
        let config = options.config;
        let dir = &config.runtime_dir;
        prepare_runtime_dir(dir)
            .map_err(|error| Fault::failed(format_args!("the runtime directory {}", dir.display()), error))?;
        let path = options.control.unwrap_or_else(|| find::socket_of(dir, std::process::id()));
        let control = ControlSocket::bind(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => Fault::new(
                FaultKind::Exists,
                format!(
                    "{}: another process answers on this control socket: name another with --control",
                    path.display()
                ),
            ),
            _ => Fault::failed(format_args!("the control socket {}", path.display()), error),
        })?;
        let (supervisor, ready) = Supervisor::start(
            config,
            options.made,
            options.reactor,
            options.listeners,
            options.incoming,
            options.stop_within,
            options.xen,
        )?;
        let supervisor = Arc::new(supervisor);
        Ok(Daemon { control, signals, runtime, supervisor, ready, stop_within: options.stop_within })
    }

    /// The disks as they are served from the start, in the order of the configuration.
    pub fn ready(&self) -> &[DiskInfo] {
        &self.ready
    }

    /// Where the control socket is.
    pub fn control(&self) -> &std::path::Path {
        self.control.path()
    }

    /// Serves until SIGTERM, SIGINT or SIGHUP (where the latter two are not ignored), or, if `until_empty`, until the last disk was detached; then stops
    /// cleanly. A second signal meanwhile ends the process at once, with exit code 1.
    ///
    /// # Errors
    /// Disks that did not stop cleanly.
    pub fn run(mut self, until_empty: bool) -> Result<(), StartError> {
        let status = format!("{} disks", self.ready.len());
        service::notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
        let (control, signals, supervisor) = (&self.control, &mut self.signals, &self.supervisor);
        let stop_within = self.stop_within;
        let result = self.runtime.block_on(async {
            let (tell, told) = oneshot::channel::<()>();
            let serve = control.serve(supervisor.clone(), async move {
                let _ = told.await;
            });
            let stop = async move {
                tokio::select! {
                    () = signals.next() => {}
                    () = supervisor.empty(), if until_empty => {}
                }
                service::notify(&[NotifyState::Stopping]);
                let _ = tell.send(());
                let stopping = supervisor.clone();
                let stopped = tokio::task::spawn_blocking(move || stopping.stop(stop_within));
                tokio::select! {
                    stopped = stopped => stopped.unwrap_or_else(|error| Err(Fault::failed("stopping", error).into())),
                    () = signals.next() => {
                        tracing::warn!("stopped at once by a second signal");
                        std::process::exit(1);
                    }
                }
            };
            tokio::pin!(serve, stop);
            tokio::select! {
                stopped = &mut stop => {
                    // Whoever asked for what ended this gets an answer; one who reads it slowly is not waited for.
                    let _ = tokio::time::timeout(ANSWERS_WITHIN, serve).await;
                    stopped
                }
                served = &mut serve => {
                    // It ends when it was told to; by itself only where its socket fails, and the disks go on without.
                    if let Err(error) = served {
                        tracing::error!("the control socket: {error}");
                    }
                    stop.await
                }
            }
        });
        self.runtime.shutdown_background();
        result
    }
}
