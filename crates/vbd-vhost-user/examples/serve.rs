//! Serves a file: `serve FILE SOCKET...`, one reactor, until killed.

use vbd_image::raw::{Raw, RawOptions};
use vbd_ring::{Reactor, Settings};
use vbd_vhost_user::{Options, Server};

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let file = arguments.next().expect("FILE SOCKET...");
    let reactor = Reactor::spawn("vbd-reactor", Settings::default()).expect("a reactor");
    let serve = |socket| {
        let disk = Raw::new(RawOptions { share: true, ..RawOptions::new(&file) });
        Server::bind(socket, disk, vec![reactor.handle()], Options::default()).expect("the socket")
    };
    let _servers: Vec<Server> = arguments.map(serve).collect();
    loop {
        std::thread::park();
    }
}
