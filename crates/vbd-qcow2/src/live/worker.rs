//! A queue of the image's own, on a reactor of its own: for long work while guests go on.

use std::rc::Rc;
use std::sync::Arc;

use vbd_core::{Error, ErrorKind, Result};
use vbd_ring::sync::mpsc::sync_channel;
use vbd_ring::{Place, Reactor, Remote, Settings};

use super::channel::Qcow2Channel;
use super::image::Image;

/// The queue, as the thread sees it that has the work to do. Dropped, it is given up.
pub(super) struct Worker {
    port: Remote<Port>,
    _reactor: Reactor,
}

struct Port {
    channel: Rc<Qcow2Channel>,
    place: Place,
}

impl Worker {
    /// A queue of this image, which the caller keeps open.
    pub(super) fn new(image: &Arc<Image>) -> Result<Self> {
        let failed = |error| Error::io("cannot start a thread for the image", error);
        let reactor = Reactor::spawn("vbd-qcow2", Settings::default()).map_err(failed)?;
        let (sender, refused) = sync_channel(1);
        let image = image.clone();
        let port = Remote::new(&reactor.handle(), move |local, place| {
            match Qcow2Channel::new(image, Arc::new(()), local) {
                Ok(channel) => Ok(Rc::new(Port { channel, place })),
                Err(error) => {
                    let _ = sender.send(error);
                    Err(String::new())
                }
            }
        });
        match port {
            Ok(port) => Ok(Worker { port, _reactor: reactor }),
            Err(_) => Err(refused.try_recv().unwrap_or_else(|_| gone())),
        }
    }

    /// Runs a task with the queue's channel, and waits for it.
    pub(super) fn run<T, W, F>(&self, work: W) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + 'static,
        W: FnOnce(Rc<Qcow2Channel>) -> F + Send + 'static,
    {
        let (sender, receiver) = sync_channel(1);
        self.port.post(move |port| {
            let task = work(port.channel.clone());
            port.channel.io.local.spawn(async move {
                let _ = sender.send(task.await);
            });
        });
        receiver.recv().unwrap_or_else(|_| Err(gone()))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // On its thread, while that can still take requests.
        self.port.with(|port| port.place.leave());
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Cancelled, "the task was given up")
}
