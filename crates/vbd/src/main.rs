//! The command: one module a verb, each with its arguments and a `run`.

mod output;
mod paste;
mod progress;
mod verbs;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;

/// Virtual disks made of plain files: make, fill, tailor and serve them.
#[derive(Parser)]
#[command(name = "vbd", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: verbs::Verb,
}

/// An error in how the command was called, found after parsing: exit code 2.
#[derive(Debug)]
pub(crate) struct UsageError(pub(crate) String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// An exit code that says something of its own. Alone it is no failure: nothing is printed.
#[derive(Debug)]
pub(crate) struct Exit(pub(crate) u8);

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit code {}", self.0)
    }
}

impl std::error::Error for Exit {}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("VBD_LOG").unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    match cli.verb.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.downcast_ref::<Exit>().map(|exit| ExitCode::from(exit.0));
            // With a failure behind it, the code is what the chain of errors begins with.
            let text = error.chain().skip(usize::from(code.is_some())).map(ToString::to_string);
            let text = text.collect::<Vec<_>>().join(": ");
            if text.is_empty() {
                return code.unwrap_or(ExitCode::FAILURE);
            }
            // Several things that are wrong are told together, a line each.
            eprintln!("vbd: {}", text.replace('\n', "\nvbd: "));
            let failure = if error.is::<UsageError>() { ExitCode::from(2) } else { ExitCode::FAILURE };
            code.unwrap_or(failure)
        }
    }
}
