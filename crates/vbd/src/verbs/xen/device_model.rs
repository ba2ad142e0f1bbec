//! `vbd xen device-model`.

use std::ffi::OsString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use vbd_daemon::control::find;
use vbd_daemon::xen::RUNTIME_DIR;

use super::qmp;
use crate::UsageError;

/// Stand in for QEMU before xl, for a PV domain whose disks of backendtype=qdisk are served by `vbd xen serve --qdisk`.
///
/// xl starts it by itself: device_model_override = "/usr/lib/vbd/xen-device-model".
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What xl tells QEMU
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    qemu: Vec<OsString>,
}

/// What matters of QEMU's arguments.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    domid: u16,
    /// Where xl expects a QMP monitor.
    monitors: Vec<PathBuf>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let words: Vec<String> = args.qemu.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let told = read(&words).map_err(UsageError)?;
    if find::sockets(Path::new(RUNTIME_DIR))?.is_empty() {
        bail!(
            "no vbd answers in {RUNTIME_DIR}: `vbd xen serve --qdisk` has to run before the domain is created"
        );
    }
    let mut listeners = Vec::new();
    for path in &told.monitors {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| path.display().to_string());
            }
            _ => {}
        }
        listeners.push(UnixListener::bind(path).with_context(|| path.display().to_string())?);
    }
    let state = format!("device-model/{}/state", told.domid);
    let written = Command::new("xenstore-write").args([state.as_str(), "running"]).status();
    let written = written.context("xenstore-write")?;
    if !written.success() {
        bail!("xenstore-write {state}: {written}");
    }
    std::thread::scope(|scope| {
        for listener in &listeners {
            scope.spawn(|| qmp::serve(listener));
        }
    });
    Ok(())
}

/// Picks the domain and the monitors out of QEMU's arguments.
fn read(words: &[String]) -> Result<Told, String> {
    let after = |option: &str| {
        words
            .windows(2)
            .filter(move |pair| pair[0] == option)
            .map(|pair| pair[1].as_str())
            .collect::<Vec<_>>()
    };
    let domid = after("-xen-domid").first().and_then(|number| number.parse().ok());
    let domid = domid.ok_or("no `-xen-domid N` among the arguments: this is for xl to start")?;
    let machine = after("-M").into_iter().chain(after("-machine")).next().unwrap_or_default();
    let machine = machine.split(',').next().unwrap_or_default();
    if machine != "xenpv" {
        return Err(format!(
            "the domain is to have the devices of `{machine}`, which QEMU has and vbd has not: this is for PV domains"
        ));
    }
    let socket = |device: &str| {
        let mut parts = device.split(',');
        (parts.next() == Some("socket"))
            .then(|| parts.find_map(|part| part.strip_prefix("path=")).map(PathBuf::from))
            .flatten()
    };
    let monitors: Vec<_> = after("-chardev").into_iter().filter_map(socket).collect();
    if monitors.is_empty() {
        return Err(
            "no `-chardev socket,...,path=...` among the arguments: where is the monitor to be?".to_owned()
        );
    }
    Ok(Told { domid, monitors })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn what_matters_is_found_among_what_xl_tells_qemu() {
        let line = "-xen-domid 7 -no-shutdown -chardev socket,id=libxl-cmd,path=/run/xen/qmp-libxl-7,server=on,wait=off \
                    -mon chardev=libxl-cmd,mode=control -nodefaults -xen-attach -name vm1 -vnc none -machine xenpv -m 193";
        let told = read(&words(line)).unwrap();
        assert_eq!(told, Told { domid: 7, monitors: vec!["/run/xen/qmp-libxl-7".into()] });
        assert!(read(&words(&line.replace("xenpv", "xenfv"))).unwrap_err().contains("`xenfv`"));
        assert!(read(&words("-machine xenpv")).unwrap_err().contains("-xen-domid"));
        assert!(read(&words("-xen-domid 3 -machine xenpv")).unwrap_err().contains("monitor"));
        assert!(read(&[]).is_err());
    }
}
