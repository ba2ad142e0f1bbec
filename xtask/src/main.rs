//! What a developer runs: `cargo xtask demo`, `cargo xtask test`, `cargo xtask bench`, `cargo xtask setup`.

mod apt;
mod bench;
mod demo;
mod setup;
mod test;

use std::process::ExitCode;

use clap::Parser;

/// Development commands of vbd. Each does its own set-up first, installing by apt what is missing.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Make a Debian disk, serve it, boot it, trim it, check it
    Demo(demo::Args),
    /// Run every test, with real guests where they matter
    Test(test::Args),
    /// Measure vbd beside its peers, in one run, as ratios
    Bench(bench::Args),
    /// Install what demo and test need, and nothing else
    Setup,
}

fn main() -> ExitCode {
    let done = match Task::parse() {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Bench(args) => setup::run().and_then(|()| bench::run(&args)),
        Task::Setup => setup::run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
