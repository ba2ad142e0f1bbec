//! Storage that hangs while the reactor above it ends: the lease is not given away.

use std::time::Duration;

use vbd_core::{Disk, ErrorKind, Operation};
use vbd_image::raw::{Raw, RawOptions};
use vbd_ring::{EngineKind, Settings};

use crate::one_file::{Manner, OLD, OneFile};
use crate::support::{Ask, Client, until};

#[test]
fn the_lease_is_kept_until_what_a_stopped_reactor_left_has_landed() {
    let write = |skew| (EngineKind::Threads, Ask { skew, ..Ask::write(4096, vec![7; 4096]) }, 7);
    // io_uring carries writes to FUSE out within the call that hands them over, which waits; not so fallocate.
    let discard = |engine| (engine, Ask::new(Operation::Discard, 4096, 4096), 0);
    // Writes on the fast path, and through a bounce buffer where the memory does not fit.
    for (engine, ask, new) in [discard(EngineKind::Uring), discard(EngineKind::Threads), write(0), write(3)] {
        let what = format!("{ask:?}, {engine:?}");
        let Some(image) = OneFile::mount(Manner::Hangs) else { return };
        let options = RawOptions { lease_wait: Duration::ZERO, ..RawOptions::new(image.path()) };
        let ours = Raw::new(options.clone());
        let session = ours.open().expect("opened");
        let settings = Settings { engine, stop_within: Duration::from_secs(60), ..Settings::default() };
        let client = Client::with(settings, move |local| session.channel(local).expect("a channel"));
        let _answer = client.submit(ask);
        image.wait_for_a_change();
        let ending = std::thread::spawn(move || drop(client));

        let stranger = Raw::new(options);
        // Again and again, since the reactor stops beside this.
        for _ in 0..10 {
            let refused = stranger.open().err().map(|error| error.kind());
            assert_eq!(refused, Some(ErrorKind::Busy), "{what}: it is still on its way");
            assert_eq!(image.byte_at(4096), OLD);
            std::thread::sleep(Duration::from_millis(20));
        }
        image.let_writes_land();
        until("the lease", || stranger.open().is_ok());
        assert_eq!(image.byte_at(4096), new, "{what}: given away too early");
        ending.join().expect("ended");
    }
}
