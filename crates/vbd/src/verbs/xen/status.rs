//! `vbd xen status`.

use std::path::Path;

use anyhow::bail;
use vbd_daemon::control::XenDevice;
use vbd_daemon::xen::RUNTIME_DIR;

use super::super::control;
use crate::output::{Table, print, print_json};

/// Show the devices of Xen's domains: state, features, queues, granted pages.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    control: control::Args,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let processes = args.control.or(Path::new(RUNTIME_DIR)).ask(vbd_daemon::control::Client::xen)?;
    let mut devices: Vec<XenDevice> = Vec::new();
    let mut serves = false;
    for (_, answer) in processes {
        serves |= answer.is_some();
        devices.extend(answer.into_iter().flatten());
    }
    if !serves {
        bail!("no process serves Xen's domains here: `systemctl start vbd-xen`, or `vbd xen serve`");
    }
    if args.json {
        return print_json(&devices);
    }
    if devices.is_empty() {
        eprintln!("vbd: no domain has a disk of vbd");
        return Ok(());
    }
    let headings = [
        "DOMAIN",
        "DEVICE",
        "ACCESS",
        "STATE",
        ">QUEUES",
        ">RING",
        ">GRANTS",
        ">REQUESTS",
        ">ERRORS",
        "FEATURES",
        "FILE",
    ];
    let mut table = Table::new(&headings);
    for device in &devices {
        table.row([
            domain(device),
            device.device.clone(),
            if device.read_only { "r" } else { "w" }.to_owned(),
            state(device),
            device.queues.to_string(),
            device.ring_pages.to_string(),
            device.grants_mapped.to_string(),
            device.requests.to_string(),
            device.errors.to_string(),
            if device.features.is_empty() { "-".to_owned() } else { device.features.join(",") },
            device.params.clone(),
        ]);
    }
    print(&table.render(0))?;
    for device in &devices {
        if let Some(problem) = &device.problem {
            eprintln!("vbd: {} {}: {problem}", domain(device), device.device);
        }
    }
    Ok(())
}

fn domain(device: &XenDevice) -> String {
    device
        .domain
        .as_ref()
        .map_or_else(|| device.domid.to_string(), |name| format!("{name} ({})", device.domid))
}

/// The state of both ends, in a word where they agree.
fn state(device: &XenDevice) -> String {
    if device.connected || device.state == device.frontend {
        device.state.clone()
    } else {
        format!("{}/{}", device.state, device.frontend)
    }
}
