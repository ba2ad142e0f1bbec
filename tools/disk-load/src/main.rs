//! Loads an image through vbd's own channels, without a front-end: what formats and filters cost by themselves. With
//! `--ops` fixed, callgrind counts the instructions of a request.

mod queue;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use vbd_core::track::Tracked;
use vbd_core::{Disk, Operation};
use vbd_formats::{Format, ImageSpec};
use vbd_ring::{EngineKind, Reactor, Settings};

use queue::{Plan, Queue};

/// Load an image in this process and report its speed.
#[derive(Parser)]
#[command(name = "disk-load", version, about)]
struct Args {
    /// The image
    image: PathBuf,
    /// Its format
    #[arg(long, default_value = "raw")]
    format: Format,
    /// Access pattern
    #[arg(long, value_enum, default_value_t = Pattern::Randwrite)]
    rw: Pattern,
    /// Bytes per request, a multiple of 512
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..=1 << 24))]
    bs: u32,
    /// Requests in flight per queue
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    depth: u32,
    /// Queues, each on a thread of its own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    queues: u32,
    /// Requests, over all queues
    #[arg(long, default_value_t = 100_000)]
    ops: u64,
    /// Bitmaps that note what is written
    #[arg(long, default_value_t = 0)]
    bitmaps: u32,
    /// Put what keeps bitmaps in front, as servers do, even where there are none
    #[arg(long)]
    track: bool,
    /// What does I/O. valgrind does not know io_uring
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    engine: Engine,
    /// Seed of the random offsets
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Pattern {
    /// Reads at random offsets
    Randread,
    /// Writes at random offsets
    Randwrite,
}

#[derive(Clone, Copy, ValueEnum)]
enum Engine {
    /// io_uring where it can be had
    Auto,
    /// A pool of threads
    Threads,
}

impl From<Engine> for EngineKind {
    fn from(engine: Engine) -> Self {
        match engine {
            Engine::Auto => EngineKind::Auto,
            Engine::Threads => EngineKind::Threads,
        }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut disk: Arc<dyn Disk> = vbd_formats::open(&ImageSpec::new(&args.image, args.format))?;
    if args.track || args.bitmaps > 0 {
        disk = Tracked::new(disk, None);
    }
    let session = disk.open()?;
    for bitmap in 0..args.bitmaps {
        let track = session.track().context("the disk keeps no bitmaps")?;
        track.add(&format!("bitmap {bitmap}"), 65536, false)?;
    }
    let size = session.geometry().size;
    ensure!(
        args.bs.is_multiple_of(512) && u64::from(args.bs) <= size,
        "--bs is no multiple of 512, or too much"
    );
    let each = args.ops / u64::from(args.queues);
    let (sender, receiver) = channel();
    let mut reactors = Vec::new();
    let start = Instant::now();
    for queue in 0..args.queues {
        let settings = Settings { engine: args.engine.into(), ..Settings::default() };
        let reactor = Reactor::spawn("load", settings)?;
        let plan = Plan {
            operation: match args.rw {
                Pattern::Randread => Operation::Read,
                Pattern::Randwrite => Operation::Write,
            },
            block: args.bs,
            blocks: size / u64::from(args.bs),
            depth: args.depth,
            requests: each,
            seed: args.seed + u64::from(queue),
        };
        let (session, sender) = (session.clone(), sender.clone());
        reactor.handle().post(move |local| match session.channel(local) {
            Ok(channel) => Queue::start(channel, local, &plan, sender),
            Err(error) => drop(sender.send(Err(error.to_string()))),
        });
        reactors.push(reactor);
    }
    for _ in 0..args.queues {
        // A minute for each million is plenty, even under callgrind.
        let most = Duration::from_secs(60 + args.ops / 1000);
        receiver.recv_timeout(most).context("requests do not come back")?.map_err(anyhow::Error::msg)?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let ops = each * u64::from(args.queues);
    drop(reactors);
    // Closes the image.
    drop(session);
    let iops = ops as f64 / seconds;
    if args.json {
        println!(
            "{}",
            serde_json::json!({ "ops": ops, "seconds": seconds, "iops": iops, "queues": args.queues })
        );
    } else {
        println!("{iops:.0} IOPS: {ops} requests in {seconds:.3} s by {} queues", args.queues);
    }
    Ok(())
}
