//! Random operations through the protocol against a vector of bytes.

mod common;

use common::{Client, Memory, Style, serve_disk};
use proptest::prelude::*;
use std::os::unix::net::UnixStream;

const SIZE: usize = 4 << 20;

#[derive(Clone, Debug)]
enum Step {
    Read(usize, usize),
    Write(usize, usize, u8),
    Zero(usize, usize),
    Trim(usize, usize),
    Flush,
    Status(usize, usize),
    /// The next operations use the other connection.
    Switch,
}

fn step() -> impl Strategy<Value = Step> {
    let len = prop_oneof![1usize..2048, (1usize..64).prop_map(|n| n * 512), 1usize..(3 << 20)];
    let range = (0..SIZE, len, any::<bool>()).prop_map(|(start, len, aligned)| {
        let unit = if aligned { 512 } else { 1 };
        let start = start / unit * unit;
        (start, (len.next_multiple_of(unit)).min(SIZE - start).max(1))
    });
    prop_oneof![
        4 => range.clone().prop_map(|(start, len)| Step::Read(start, len)),
        5 => (range.clone(), 1u8..).prop_map(|((start, len), byte)| Step::Write(start, len, byte)),
        2 => range.clone().prop_map(|(start, len)| Step::Zero(start, len)),
        1 => range.clone().prop_map(|(start, len)| Step::Trim(start, len)),
        1 => Just(Step::Flush),
        1 => range.prop_map(|(start, len)| Step::Status(start, len)),
        1 => Just(Step::Switch),
    ]
}

fn run(client: &mut Client<UnixStream>, model: &mut [u8], step: &Step) {
    match *step {
        Step::Read(start, len) => assert!(client.read(start as u64, len as u64) == model[start..start + len]),
        Step::Write(start, len, byte) => {
            let data: Vec<_> =
                (0..len).map(|at| byte.wrapping_add(u8::try_from(at % 251).unwrap())).collect();
            assert_eq!(client.write(0, start as u64, &data), 0);
            model[start..start + len].copy_from_slice(&data);
        }
        Step::Zero(start, len) => {
            assert_eq!(client.command(6, 0, start as u64, len as u64, &[]).error, 0);
            model[start..start + len].fill(0);
        }
        Step::Trim(start, len) => {
            assert_eq!(client.command(4, 0, start as u64, len as u64, &[]).error, 0);
            let (first, last) = (start.next_multiple_of(512), (start + len) / 512 * 512);
            if first < last {
                model[first..last].fill(0);
            }
        }
        Step::Flush => assert_eq!(client.command(3, 0, 0, 0, &[]).error, 0),
        Step::Status(start, len) => {
            let reply = client.command(7, 0, start as u64, len as u64, &[]);
            if client.style == Style::Simple {
                assert_eq!(reply.error, 22);
                return;
            }
            let mut at = start;
            for (extent, flags) in reply.extents {
                let end = at + usize::try_from(extent).unwrap();
                assert!(end <= start + len);
                assert!(flags == 0 || model[at..end].iter().all(|byte| *byte == 0));
                at = end;
            }
            assert!(at > start);
        }
        Step::Switch => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_disk_is_a_vector_of_bytes(steps in prop::collection::vec(step(), 1..60), styles in (0usize..3, 0usize..3)) {
        let disk = Memory::new(SIZE);
        let served = serve_disk(disk.clone());
        let all = [Style::Simple, Style::Structured, Style::Extended];
        let mut clients = [all[styles.0], all[styles.1]].map(|style| {
            let mut client = served.connect();
            client.go(style, "").unwrap();
            client
        });
        let mut model = vec![0; SIZE];
        let mut turn = 0;
        for step in &steps {
            turn = if matches!(step, Step::Switch) { 1 - turn } else { turn };
            run(&mut clients[turn], &mut model, step);
        }
        assert!(disk.content() == model);
    }
}
