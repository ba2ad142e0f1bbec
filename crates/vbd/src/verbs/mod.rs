//! The verbs. Each module holds the arguments of one and runs it.

mod amend;
mod attach;
mod backup;
mod backups;
mod bitmap;
mod bitmap_qcow2;
mod build;
mod check;
mod clone;
mod commit;
mod compact;
mod compare;
mod completions;
mod control;
mod convert;
mod create;
mod detach;
mod device;
mod disk;
mod grow;
mod image;
mod info;
mod inside;
mod job;
mod list;
mod man;
mod map;
mod measure;
mod rebase;
mod resize;
mod restore;
mod seed;
mod serving;
mod shrink;
mod snapshot;
mod stat;
mod target;
mod up;
mod xen;

use std::path::Path;

use vbd_formats::Format;

/// The format of a file: the one that was told with `option`, or raw, if the file does not look like something else.
fn format_of(file: &Path, told: Option<Format>, option: &str) -> anyhow::Result<Format> {
    if let Some(format) = told {
        return Ok(format);
    }
    vbd_formats::assumed_raw(file, option)?;
    Ok(Format::Raw)
}

#[derive(clap::Subcommand)]
pub(crate) enum Verb {
    Create(Box<create::Args>),
    Build(Box<build::Args>),
    #[command(name = "__build-stage", hide = true)]
    BuildStage,
    Seed(seed::Args),
    Info(info::Args),
    Map(map::Args),
    Convert(Box<convert::Args>),
    Compare(compare::Args),
    Measure(Box<measure::Args>),
    Resize(resize::Args),
    Amend(Box<amend::Args>),
    Snapshot(snapshot::Args),
    Rebase(rebase::Args),
    Flatten(rebase::FlattenArgs),
    Commit(commit::Args),
    Check(check::Args),
    Compact(compact::Args),
    Clone(Box<clone::Args>),
    Shrink(shrink::Args),
    Ls(inside::ls::Args),
    Cat(inside::cat::Args),
    Cp(inside::cp::Args),
    Tar(inside::tar::Args),
    Find(inside::find::Args),
    Df(inside::df::Args),
    Du(inside::du::Args),
    Diff(inside::diff::Args),
    Edit(inside::edit::Args),
    Rm(inside::rm::Args),
    Mv(inside::mv::Args),
    Mkdir(inside::mkdir::Args),
    Ln(inside::ln::Args),
    Chmod(inside::chmod::Args),
    Chown(inside::chown::Args),
    Tailor(Box<inside::tailor::Args>),
    Attach(Box<attach::Args>),
    Up(up::Args),
    List(list::Args),
    Stat(stat::Args),
    Grow(grow::Args),
    Bitmap(bitmap::Args),
    Backup(Box<backup::Args>),
    Backups(backups::Args),
    Restore(restore::Args),
    Detach(detach::Args),
    Xen(xen::Args),
    Completions(completions::Args),
    Man(man::Args),
}

impl Verb {
    pub(crate) fn run(self) -> anyhow::Result<()> {
        match self {
            Verb::Create(args) => create::run(*args),
            Verb::Build(args) => build::run(*args),
            Verb::BuildStage => Ok(vbd_fs::serve_stage()?),
            Verb::Seed(args) => seed::run(args),
            Verb::Info(args) => info::run(args),
            Verb::Map(args) => map::run(args),
            Verb::Convert(args) => convert::run(*args),
            Verb::Compare(args) => compare::run(args),
            Verb::Measure(args) => measure::run(*args),
            Verb::Resize(args) => resize::run(args),
            Verb::Amend(args) => amend::run(*args),
            Verb::Snapshot(args) => snapshot::run(args),
            Verb::Rebase(args) => rebase::run(args),
            Verb::Flatten(args) => rebase::flatten(args),
            Verb::Commit(args) => commit::run(args),
            Verb::Check(args) => check::run(args),
            Verb::Compact(args) => compact::run(args),
            Verb::Clone(args) => clone::run(*args),
            Verb::Shrink(args) => shrink::run(args),
            Verb::Ls(args) => inside::ls::run(args),
            Verb::Cat(args) => inside::cat::run(args),
            Verb::Cp(args) => inside::cp::run(args),
            Verb::Tar(args) => inside::tar::run(args),
            Verb::Find(args) => inside::find::run(args),
            Verb::Df(args) => inside::df::run(args),
            Verb::Du(args) => inside::du::run(args),
            Verb::Diff(args) => inside::diff::run(args),
            Verb::Edit(args) => inside::edit::run(args),
            Verb::Rm(args) => inside::rm::run(args),
            Verb::Mv(args) => inside::mv::run(args),
            Verb::Mkdir(args) => inside::mkdir::run(args),
            Verb::Ln(args) => inside::ln::run(args),
            Verb::Chmod(args) => inside::chmod::run(args),
            Verb::Chown(args) => inside::chown::run(args),
            Verb::Tailor(args) => inside::tailor::run(*args),
            Verb::Attach(args) => attach::run(*args),
            Verb::Up(args) => up::run(args),
            Verb::List(args) => list::run(args),
            Verb::Stat(args) => stat::run(args),
            Verb::Grow(args) => grow::run(args),
            Verb::Bitmap(args) => bitmap::run(args),
            Verb::Backup(args) => backup::run(*args),
            Verb::Backups(args) => backups::run(args),
            Verb::Restore(args) => restore::run(args),
            Verb::Detach(args) => detach::run(args),
            Verb::Xen(args) => xen::run(args),
            Verb::Completions(args) => completions::run(args),
            Verb::Man(args) => man::run(args),
        }
    }
}
