//! A load generator for vhost-user-blk servers: it plays the guest's driver, without a guest.
//!
//! One thread drives one queue. It submits in batches, kicks only when the server asked for it, and either sleeps
//! on the queue's call eventfd (as a guest takes interrupts) or polls the used ring.

mod cli;
mod cpu;
mod device;
mod histogram;
mod hold;
mod pattern;
mod plan;
mod report;
mod run;
mod worker;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = cli::Args::parse();
    let outcome = match args.hold {
        Some(duration) => hold::hold(&args, duration),
        None => run::run(&args).map(|report| report.print(args.json)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vbd-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}
