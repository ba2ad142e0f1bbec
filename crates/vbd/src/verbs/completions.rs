//! `vbd completions`.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::output;

/// Print what a shell needs to complete vbd's verbs and options.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The shell
    shell: Shell,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "vbd", &mut script);
    Ok(output::print(&String::from_utf8(script)?)?)
}
