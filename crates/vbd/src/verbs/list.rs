//! `vbd list`.

use serde::Serialize;
use vbd_daemon::control::{DiskInfo, FrontEndInfo};
use vbd_image::size::Human;

use super::control;
use crate::output::{Table, print, print_json};

/// Show the disks that are served.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    control: control::Args,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A disk as `--json` shows it.
#[derive(Serialize)]
struct Listed {
    pid: u32,
    control: std::path::PathBuf,
    #[serde(flatten)]
    disk: DiskInfo,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut disks = Vec::new();
    for (client, (process, served)) in args.control.ask(|client| Ok((client.process()?, client.disks()?)))? {
        let control = client.socket();
        let listed = |disk| Listed { pid: process.pid, control: control.to_owned(), disk };
        disks.extend(served.into_iter().map(listed));
    }
    if args.json {
        return print_json(&disks);
    }
    if disks.is_empty() {
        eprintln!("vbd: no disk is served");
        return Ok(());
    }
    let mut table = Table::new(&["NAME", ">SIZE", "ACCESS", ">CLIENTS", "FRONT-ENDS", "FILE", ">PROCESS"]);
    for Listed { pid, disk, .. } in &disks {
        table.row([
            disk.name.clone(),
            disk.size.map_or_else(|| "?".to_owned(), |size| Human(size).to_string()),
            if disk.read_only { "r" } else { "w" }.to_owned(),
            disk.clients().to_string(),
            disk.front_ends.iter().map(front_end).collect::<Vec<_>>().join(", "),
            disk.path.display().to_string(),
            pid.to_string(),
        ]);
    }
    print(&table.render(0))?;
    for Listed { disk, .. } in &disks {
        for problem in disk.problem.iter().chain(disk.front_ends.iter().filter_map(|f| f.problem.as_ref())) {
            eprintln!("vbd: {}: {problem}", disk.name);
        }
    }
    Ok(())
}

fn front_end(front_end: &FrontEndInfo) -> String {
    format!("{} {}", front_end.kind, front_end.address)
}
