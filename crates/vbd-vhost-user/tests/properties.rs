//! Rings made by chance, most of them almost right.

use proptest::prelude::*;
use vbd_vhost_user::{fuzz_inflight, fuzz_virtqueue};

const GUEST: u64 = 0x1_0000;

/// A descriptor whose fields are likely to make sense: address, length, flags, successor.
fn descriptor() -> impl Strategy<Value = Vec<u8>> {
    let address = prop_oneof![
        4 => (0x3000u64..0x1_1000).prop_map(|offset| GUEST + offset),
        2 => (0u64..4).prop_map(|index| GUEST + 0x4000 + 0x100 * index),
        1 => any::<u64>(),
    ];
    let len =
        prop_oneof![3 => Just(16u32), 3 => Just(512), 1 => Just(1), 2 => 0u32..0x2000, 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0u16..4, 2 => 0u16..8, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| {
        let halves = [flags, next].map(u16::to_le_bytes);
        [&address.to_le_bytes()[..], &len.to_le_bytes(), halves.as_flattened()].concat()
    })
}

fn image() -> impl Strategy<Value = Vec<u8>> {
    let table = || prop::collection::vec(descriptor(), 8);
    let heads = prop::collection::vec(prop_oneof![8 => 0u16..8, 1 => any::<u16>()], 8);
    let headers = prop::collection::vec((0u32..14, any::<u16>()), 8);
    (table(), heads, table(), headers, 0u16..12, any::<u8>(), any::<u16>()).prop_map(
        |(descriptors, heads, indirect, headers, ahead, control, base)| {
            let mut bytes = vec![0; 0x1_1000];
            let mut put = |at: usize, from: &[u8]| bytes[at..at + from.len()].copy_from_slice(from);
            put(0, &descriptors.concat());
            put(0x1002, &base.wrapping_add(ahead).to_le_bytes());
            heads.iter().enumerate().for_each(|(index, head)| put(0x1004 + 2 * index, &head.to_le_bytes()));
            for index in 0..4 {
                put(0x4000 + 0x100 * index, &indirect.concat());
            }
            for (index, (kind, sector)) in headers.iter().enumerate() {
                put(0x5000 + 16 * index, &kind.to_le_bytes());
                put(0x5008 + 16 * index, &u64::from(*sector).to_le_bytes());
            }
            [&[3, control][..], &base.to_le_bytes(), &bytes].concat()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn nothing_leaves_guest_memory(image in image()) {
        fuzz_virtqueue(&image);
    }

    #[test]
    fn bytes_without_any_sense(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        fuzz_virtqueue(&bytes);
    }

    #[test]
    fn an_in_flight_region_names_each_head_once(
        mut bytes in prop::collection::vec(prop_oneof![4 => Just(0u8), 1 => any::<u8>()], 21..600),
        fresh in any::<bool>(),
    ) {
        bytes[13] = u8::from(!fresh);
        fuzz_inflight(&bytes);
    }
}

#[test]
fn the_corpora_pass() {
    vbd_testing::corpus::replay("virtqueue_request", fuzz_virtqueue);
    vbd_testing::corpus::replay("virtqueue_inflight", fuzz_inflight);
}
