//! A run: connects, starts the workers, watches them, adds up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use vbd_tests::cpu_time;
use virtio_driver::EventFd;

use crate::cli::Args;
use crate::cpu;
use crate::device::Device;
use crate::histogram::Histogram;
use crate::plan::Plan;
use crate::report::Report;
use crate::worker::{Shared, Tally, Window, Worker};

/// CPU time of the two sides.
#[derive(Clone, Copy)]
struct Cpu {
    own: Duration,
    server: Option<Duration>,
}

impl Cpu {
    fn now(args: &Args) -> anyhow::Result<Self> {
        let server = args.server_pid.map(cpu_time).transpose()?;
        Ok(Cpu { own: cpu_time(std::process::id())?, server })
    }
}

/// Does what the arguments say.
pub(crate) fn run(args: &Args) -> anyhow::Result<Report> {
    let [socket] = args.sockets.as_slice() else {
        bail!("one socket at a time, unless with --hold");
    };
    ensure!(args.bs > 0 && args.bs.is_multiple_of(512), "--bs {}: not a multiple of 512", args.bs);
    let block_size = u32::try_from(args.bs).context("--bs is too large")?;

    let mut device = Device::connect(socket, args.timeout)?;
    ensure!(!(args.rw.writes() && device.read_only), "{}: the disk is read-only", socket.display());
    let size = device.capacity.min(args.size.unwrap_or(u64::MAX));
    let blocks = size / args.bs / u64::from(args.queues);
    ensure!(
        blocks > args.depth.into(),
        "{} bytes are too few for {} queue(s) with {} requests of {} bytes",
        size,
        args.queues,
        args.depth,
        args.bs
    );

    let part = block_size as usize * usize::from(args.depth);
    let memory = device.share(part * usize::from(args.queues))?;
    let queues = device.queues(args.queues, args.depth)?;
    let shared = Shared::default();
    let mut workers = Vec::new();
    for (index, queue) in queues.into_iter().enumerate() {
        workers.push(Worker {
            queue,
            kick: device.transport.get_submission_notifier(index),
            call: device.transport.get_completion_fd(index),
            memory: &memory,
            memory_offset: index * part,
            disk_offset: index as u64 * blocks * args.bs,
            block_size,
            depth: args.depth,
            wait: args.wait,
            plan: Plan::new(args.rw, blocks, args.seed.wrapping_add(index as u64), args.verify)?,
            shared: &shared,
        });
    }
    measure(args, workers, &shared)
}

fn measure(args: &Args, workers: Vec<Worker<'_>>, shared: &Shared) -> anyhow::Result<Report> {
    let calls: Vec<Arc<EventFd>> = workers.iter().map(|w| w.call.clone()).collect();
    let start = Instant::now();
    let window = match args.ops {
        Some(ops) => Window { from: start, until: None, ops },
        None => {
            let from = start + args.ramp;
            Window { from, until: Some(from + args.runtime), ops: u64::MAX }
        }
    };
    thread::scope(|scope| {
        let (send, receive) = channel();
        for (index, worker) in workers.into_iter().enumerate() {
            let (send, cpu) = (send.clone(), args.cpus.get(index % args.cpus.len().max(1)).copied());
            scope.spawn(move || {
                let result = cpu.map_or(Ok(()), cpu::pin).and_then(|()| worker.run(window, args.verify));
                // The receiver outlives the scope's threads.
                let _ = send.send(result);
            });
        }
        drop(send);

        let before = match window.until {
            Some(_) => {
                thread::sleep(window.from.saturating_duration_since(Instant::now()));
                Cpu::now(args)
            }
            None => Cpu::now(args),
        };
        let mut after = None;
        if let Some(until) = window.until {
            thread::sleep(until.saturating_duration_since(Instant::now()));
            after = Some(Cpu::now(args));
        }
        let mut tallies = Vec::new();
        let (mut seen, mut since) = (0, Instant::now());
        loop {
            match receive.recv_timeout(Duration::from_millis(100)) {
                Ok(result) => tallies.push(result),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let completed = shared.completed.load(Ordering::Relaxed);
                    if completed != seen {
                        (seen, since) = (completed, Instant::now());
                    } else if since.elapsed() > args.timeout {
                        shared.abort.store(true, Ordering::Relaxed);
                        calls.iter().try_for_each(|call| call.write(1))?;
                    }
                }
            }
        }
        let after = after.unwrap_or_else(|| Cpu::now(args));
        let tallies = tallies.into_iter().collect::<anyhow::Result<Vec<Tally>>>()?;
        sum_up(args, window, &tallies, before?, after?)
    })
}

fn sum_up(args: &Args, window: Window, tallies: &[Tally], before: Cpu, after: Cpu) -> anyhow::Result<Report> {
    let errors: u64 = tallies.iter().map(|t| t.errors).sum();
    ensure!(errors == 0, "{errors} request(s) failed");
    let mut latency = Histogram::new();
    tallies.iter().for_each(|t| latency.merge(&t.latency));
    ensure!(latency.count() > 0, "no request completed in the measured time");
    let end = window.until.or_else(|| tallies.iter().map(|t| t.finished).max()).unwrap_or(window.from);
    let seconds = (end - window.from).as_secs_f64();
    let per_second = latency.count() as f64 / seconds;
    let server_cpu = after.server.zip(before.server).map(|(a, b)| (a - b).as_secs_f64());
    Ok(Report {
        socket: args.sockets[0].clone(),
        rw: args.rw,
        bs: args.bs,
        depth: args.depth,
        queues: args.queues,
        wait: args.wait,
        seconds,
        ops: latency.count(),
        iops: per_second,
        mb_per_s: per_second * args.bs as f64 / 1e6,
        latency_us: (&latency).into(),
        client_cpu_s: (after.own - before.own).as_secs_f64(),
        server_cpu_s: server_cpu,
        iops_per_server_cpu: server_cpu.map(|s| latency.count() as f64 / s),
        kicks: tallies.iter().map(|t| t.kicks).sum(),
        sleeps: tallies.iter().map(|t| t.sleeps).sum(),
        verified: args.verify.then(|| tallies.iter().map(|t| t.verified).sum()),
    })
}
