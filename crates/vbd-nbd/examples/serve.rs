//! Serves a file over NBD: `cargo run --release -p vbd-nbd --example serve -- disk.img /tmp/nbd.sock`.

use std::path::PathBuf;

use vbd_image::raw::{Raw, RawOptions};
use vbd_nbd::{ExportOptions, Listen, Options, Server};
use vbd_ring::{Reactor, Settings};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(file), Some(socket)) = (arguments.next(), arguments.next()) else {
        return Err("usage: serve FILE SOCKET".into());
    };
    let reactor = Reactor::spawn("nbd", Settings::default())?;
    let server = Server::bind(Listen::Unix(socket.into()), Options::default(), vec![reactor.handle()])?;
    let disk = Raw::new(RawOptions::new(PathBuf::from(file)));
    server.add_export("disk", disk, ExportOptions::default())?;
    println!("{}; Enter ends it", server.address());
    std::io::stdin().read_line(&mut String::new())?;
    server.stop(std::time::Duration::from_secs(10));
    Ok(())
}
