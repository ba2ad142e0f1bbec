//! `vbd xen`: disks of Xen's domains.

mod device_model;
mod install;
mod qmp;
mod serve;
mod status;

/// Serve the disks of Xen's domains, in domain 0.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    Serve(serve::Args),
    Status(status::Args),
    Install(install::Args),
    DeviceModel(device_model::Args),
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.verb {
        Verb::Serve(args) => serve::run(args),
        Verb::Status(args) => status::run(args),
        Verb::Install(args) => install::run(args),
        Verb::DeviceModel(args) => device_model::run(args),
    }
}
