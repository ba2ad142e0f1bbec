//! `--hold`: many connected disks that do nothing.

use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::cli::Args;
use crate::device::Device;

/// Connects to every socket, starts its queues, and stays idle.
///
/// Prints a line when all disks are connected, with the seconds that it took.
pub(crate) fn hold(args: &Args, duration: Duration) -> anyhow::Result<()> {
    // A disk takes four descriptors: socket, memory, kick, call.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })?;
    let start = Instant::now();
    let mut held = Vec::with_capacity(args.sockets.len());
    for socket in &args.sockets {
        let mut device = Device::connect(socket, args.timeout)?;
        let queues = device.queues::<()>(args.queues, args.depth)?;
        // In this order, so that the queues go first.
        held.push((queues, device));
    }
    println!("{} disks connected in {:.3} s", held.len(), start.elapsed().as_secs_f64());
    std::thread::sleep(duration);
    Ok(())
}
