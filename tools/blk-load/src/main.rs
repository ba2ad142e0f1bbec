//! A load generator for block devices that needs nothing but the kernel: linked statically, it runs in a guest whose first
//! filesystem is all there is.
//!
//! `blk-load DEVICE LOAD BLOCK DEPTH SECONDS` keeps DEPTH requests of BLOCK bytes in flight with O_DIRECT, and prints how
//! many were answered in how many seconds. LOAD is `randread`, `randwrite`, `read` or `write`.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use io_uring::{IoUring, opcode, types};

/// One run.
struct Plan {
    device: String,
    writes: bool,
    random: bool,
    block: u32,
    depth: u32,
    time: Duration,
}

fn main() -> ExitCode {
    let done = plan(std::env::args().skip(1).collect()).and_then(|plan| run(&plan));
    match done {
        Ok((operations, seconds)) => {
            println!("{operations} {seconds:.3}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("blk-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn plan(words: Vec<String>) -> Result<Plan> {
    let [device, load, block, depth, seconds] = <[String; 5]>::try_from(words)
        .map_err(|_| anyhow::anyhow!("usage: DEVICE LOAD BLOCK DEPTH SECONDS"))?;
    let (writes, random) = match load.as_str() {
        "randread" => (false, true),
        "randwrite" => (true, true),
        "read" => (false, false),
        "write" => (true, false),
        other => bail!("unknown load {other}"),
    };
    let (block, depth): (u32, u32) = (block.parse().context("BLOCK")?, depth.parse().context("DEPTH")?);
    ensure!(block.is_power_of_two() && (512..=16 << 20).contains(&block), "BLOCK is a power of two from 512");
    ensure!((1..=1024).contains(&depth), "DEPTH is from 1 to 1024");
    let time = Duration::try_from_secs_f64(seconds.parse().context("SECONDS")?).context("SECONDS")?;
    Ok(Plan { device, writes, random, block, depth, time })
}

/// Memory for all requests, page by page, as O_DIRECT wants it.
struct Buffers {
    start: *mut u8,
    len: usize,
}

impl Buffers {
    fn new(len: usize) -> Result<Self> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory that is there.
        let start = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        };
        let start = start.context("memory for the requests")?.cast::<u8>();
        // SAFETY: the mapping was just made, is `len` long and nobody else's.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start, len) };
        // No two pages alike, so that nothing below can save work on zeroes or repetitions.
        let mut state = 1;
        bytes
            .chunks_mut(8)
            .for_each(|chunk| chunk.copy_from_slice(&next(&mut state).to_ne_bytes()[..chunk.len()]));
        Ok(Buffers { start, len })
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`; the ring, and with it every request, is gone before.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.len) };
    }
}

/// The next number of a xorshift generator (Marsaglia 2003); `state` is not 0.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Requests answered, and the seconds they took.
fn run(plan: &Plan) -> Result<(u64, f64)> {
    let failed = || plan.device.clone();
    let mut options = File::options();
    options.read(true).write(plan.writes).custom_flags(libc::O_DIRECT);
    let file = options.open(&plan.device).with_context(failed)?;
    let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).with_context(failed)?;
    let blocks = size / u64::from(plan.block);
    ensure!(blocks > 0, "{}: smaller than one block", plan.device);

    let block = usize::try_from(plan.block)?;
    let buffers = Buffers::new(block * usize::try_from(plan.depth)?)?;
    // Declared after the memory, so gone before it: its end waits for what is in flight.
    let mut ring = IoUring::new(plan.depth).context("io_uring")?;
    let fd = types::Fd(file.as_raw_fd());
    let (mut random, mut sequence) = (0x9E37_79B9_7F4A_7C15, 0);
    let mut entry = |slot: u32| {
        let place = if plan.random { next(&mut random) % blocks } else { sequence % blocks };
        sequence += 1;
        // SAFETY: the slot is less than the depth, and the memory has a block for each.
        let memory = unsafe { buffers.start.add(usize::try_from(slot).unwrap_or(0) * block) };
        let offset = place * u64::from(plan.block);
        let entry = if plan.writes {
            opcode::Write::new(fd, memory, plan.block).offset(offset).build()
        } else {
            opcode::Read::new(fd, memory, plan.block).offset(offset).build()
        };
        entry.user_data(u64::from(slot))
    };

    let begin = Instant::now();
    for slot in 0..plan.depth {
        // SAFETY: the memory is the slot's alone until its completion, and lives as long as the ring.
        unsafe { ring.submission().push(&entry(slot)) }.context("the ring is full")?;
    }
    let (mut answered, mut in_flight) = (0, plan.depth);
    while in_flight > 0 {
        ring.submit_and_wait(1).context("io_uring_enter")?;
        let goes_on = begin.elapsed() < plan.time;
        let done: Vec<_> = ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (slot, result) in done {
            if result < 0 {
                return Err(std::io::Error::from_raw_os_error(-result)).with_context(failed);
            }
            ensure!(u32::try_from(result)? == plan.block, "{}: a short transfer of {result}", plan.device);
            answered += 1;
            if goes_on {
                // SAFETY: as above; the slot's request has been answered.
                unsafe { ring.submission().push(&entry(u32::try_from(slot)?)) }
                    .context("the ring is full")?;
            } else {
                in_flight -= 1;
            }
        }
    }
    Ok((answered, begin.elapsed().as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_checked() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect();
        let good = plan(words("/dev/xvda randwrite 4096 32 0.5")).unwrap();
        assert_eq!((good.writes, good.random, good.block, good.depth), (true, true, 4096, 32));
        for bad in [
            "",
            "/dev/xvda randread 4096 32",
            "d fast 4096 1 1",
            "d read 4095 1 1",
            "d read 4096 0 1",
            "d read 4096 1 -1",
        ] {
            assert!(plan(words(bad)).is_err(), "{bad}");
        }
    }
}
