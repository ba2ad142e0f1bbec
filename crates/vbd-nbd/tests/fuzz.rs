//! The fuzz entries, with a few random inputs each: none may panic.

use proptest::prelude::*;

/// Messages that are nearly right, so that random inputs get somewhere.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just("disk"), Just(""), Just("other"), Just("none"), Just("base:allocation")];
    let data = prop::collection::vec(
        prop_oneof![
            name.prop_map(
                |name| [&u32::try_from(name.len()).unwrap().to_be_bytes()[..], name.as_bytes()].concat()
            ),
            prop::collection::vec(0u8..4, 0..6),
            prop::collection::vec(any::<u8>(), 0..40),
        ],
        0..4,
    );
    let option =
        (0u32..13, data.prop_map(|parts| parts.concat()), -2i32..12).prop_map(|(option, data, lie)| {
            let len = u32::try_from(data.len()).unwrap().wrapping_add_signed(if lie > 2 { 0 } else { lie });
            [&0x49484156454f5054u64.to_be_bytes()[..], &option.to_be_bytes(), &len.to_be_bytes(), &data]
                .concat()
        });
    (any::<[u8; 2]>(), 0u8..5, prop::collection::vec(option, 0..12))
        .prop_map(|(head, flags, options)| [&head[..], &[0, 0, 0, flags], &options.concat()].concat())
}

fn requests() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![0u64..4096, 0u64..(9 << 20), any::<u64>(), Just(8 << 20), Just(0)];
    let flags = prop_oneof![Just(0u16), 0u16..64, any::<u16>()];
    let payload = prop::collection::vec(any::<u8>(), 0..64).prop_flat_map(|seed| {
        prop_oneof![Just(0usize), 0usize..9000]
            .prop_map(move |len| seed.iter().copied().cycle().take(len).collect::<Vec<_>>())
    });
    let request = (0u16..9, flags, number.clone(), number, payload, any::<bool>());
    (any::<[u8; 2]>(), prop::collection::vec(request, 0..12)).prop_map(|(head, requests)| {
        let extended = head[0] % 3 == 2;
        let mut bytes = head.to_vec();
        for (command, flags, offset, len, payload, honest) in requests {
            let len = if honest && command == 1 { payload.len() as u64 } else { len };
            bytes.extend(if extended { 0x21e41c71u32 } else { 0x25609513 }.to_be_bytes());
            bytes.extend(flags.to_be_bytes());
            bytes.extend(command.to_be_bytes());
            bytes.extend([5; 8]);
            bytes.extend(offset.to_be_bytes());
            if extended {
                bytes.extend(len.to_be_bytes());
            } else {
                bytes.extend(u32::try_from(len & 0xffff_ffff).unwrap().to_be_bytes());
            }
            if command == 1 {
                bytes.extend(payload);
            }
        }
        bytes
    })
}

#[test]
fn the_corpora_pass() {
    vbd_testing::corpus::replay("nbd_negotiation", vbd_nbd::fuzz::negotiation);
    vbd_testing::corpus::replay("nbd_commands", vbd_nbd::fuzz::commands);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_handshake_panics(data in prop_oneof![options(), prop::collection::vec(any::<u8>(), 0..200)]) {
        vbd_nbd::fuzz::negotiation(&data);
    }

    #[test]
    fn no_request_panics(data in prop_oneof![requests(), prop::collection::vec(any::<u8>(), 0..200)]) {
        vbd_nbd::fuzz::commands(&data);
    }
}
