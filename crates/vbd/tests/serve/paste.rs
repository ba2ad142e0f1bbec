//! The lines that `attach -v` prints, run as they are where their program is here.

use std::process::Command;

use crate::harness::{Ended, MIB, Scratch, Server, run};

/// What follows a program's name, as often as it stands there.
fn lines<'a>(server: &'a Server, program: &str) -> Vec<&'a str> {
    let found = server.ready.iter().filter_map(|line| line.trim_start().strip_prefix(program));
    found.map(str::trim_start).collect()
}

/// A machine with these options, which ends as soon as all its devices are there.
fn qemu(options: &str) -> Ended {
    let machine = "qemu-system-x86_64 -S -display none -nodefaults -accel tcg -monitor stdio";
    run(Command::new("sh").args(["-c", &format!("echo quit | {machine} {options}")]))
}

#[test]
fn qemu_and_libnbd_take_their_lines_as_they_are() {
    for (name, access) in [("vm1", None), ("it's a, $disk", None), ("it's a, $disk", Some("--read-only"))] {
        let scratch = Scratch::new();
        scratch.sparse("disk", 16 * MIB);
        let (socket, export) = (format!("{name} v.sock"), format!("unix:{name} n.sock"));
        let both = ["attach", "disk", "-v", "--name", name, "--vhost-user", &socket, "--nbd", &export];
        let server = scratch.serve(both.into_iter().chain(access), 9);
        let machines = lines(&server, "QEMU");
        assert_eq!(machines.len(), 2, "{:?}", server.ready);
        for options in machines {
            let ended = qemu(options);
            assert_eq!(ended.stderr, "", "{options}");
            ended.ok();
        }
        let [info] = lines(&server, "libnbd")[..] else { panic!("{:?}", server.ready) };
        let found = run(Command::new("sh").args(["-c", &format!("{info} --json")])).json();
        let export = &found["exports"][0];
        assert_eq!((&export["export-name"], &export["export-size"]), (&name.into(), &(16 * MIB).into()));
        assert_eq!(export["is_read_only"], access.is_some());
        server.stop().ok();
    }
}
