//! Frames in, frames out: what is rewritten, what passes, what is refused.

use proptest::prelude::*;

use super::*;
use crate::hpack::Field;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![len[1], len[2], len[3], kind, flags];
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

fn field(name: &str, value: &str) -> Field {
    Field { name: name.to_owned().into(), value: value.to_owned().into(), sensitive: false }
}

fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        hpack::encode(&field(name, value), &mut block);
    }
    block
}

/// Feeds `input` in pieces of the given lengths (the rest at once) and returns what came out.
fn run(input: &[u8], cuts: &[usize]) -> Result<Vec<u8>, FrontError> {
    let mut front = Front::default();
    let mut out = Vec::new();
    let mut rest = input;
    let mut cuts = cuts.iter();
    while !rest.is_empty() {
        let len = cuts.next().copied().unwrap_or(rest.len()).clamp(1, rest.len());
        let taken = front.advance(&rest[..len], &mut out)?;
        assert!(taken > 0, "advance takes at least one byte");
        rest = &rest[taken..];
    }
    Ok(out)
}

fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = PREFACE.to_vec();
    frames.iter().for_each(|frame| bytes.extend_from_slice(frame));
    bytes
}

const REQUEST: [(&str, &str); 4] = [
    (":method", "POST"),
    (":path", "/v1beta1.DeviceManagerService/MapperRegister"),
    (":authority", "%2Fetc%2Fkubeedge%2Fdmi.sock"),
    ("te", "trailers"),
];

fn expected() -> Vec<u8> {
    let mut fields = REQUEST;
    fields[2].1 = "localhost";
    block(&fields)
}

#[test]
fn the_authority_is_replaced_and_everything_else_stays() {
    let input = connection(&[
        frame(4, 0, 0, &[0, 3, 0, 0, 0, 100]),
        frame(HEADERS, END_HEADERS, 1, &block(&REQUEST)),
        frame(0, END_STREAM, 1, b"payload"),
    ]);
    let output = connection(&[
        frame(4, 0, 0, &[0, 3, 0, 0, 0, 100]),
        frame(HEADERS, END_HEADERS, 1, &expected()),
        frame(0, END_STREAM, 1, b"payload"),
    ]);
    assert_eq!(run(&input, &[]), Ok(output.clone()));
    assert_eq!(run(&input, &vec![1; input.len()]), Ok(output));
}

#[test]
fn a_raw_path_as_authority_is_replaced_too() {
    let fields = [(":method", "POST"), (":authority", "/etc/kubeedge/dmi.sock")];
    let input = connection(&[frame(HEADERS, END_HEADERS | END_STREAM, 3, &block(&fields))]);
    let fields = [(":method", "POST"), (":authority", "localhost")];
    let output = connection(&[frame(HEADERS, END_HEADERS | END_STREAM, 3, &block(&fields))]);
    assert_eq!(run(&input, &[]), Ok(output));
}

#[test]
fn padding_priority_and_continuations_are_folded_into_one_frame() {
    let whole = block(&REQUEST);
    let (first, rest) = whole.split_at(7);
    let (second, third) = rest.split_at(11);
    let mut padded = vec![3, 0, 0, 0, 0, 16];
    padded.extend_from_slice(first);
    padded.extend_from_slice(&[0; 3]);
    let input = connection(&[
        frame(HEADERS, PADDED | PRIORITY | END_STREAM, 5, &padded),
        frame(CONTINUATION, 0, 5, second),
        frame(CONTINUATION, 0, 5, &[]),
        frame(CONTINUATION, END_HEADERS, 5, third),
    ]);
    let output = connection(&[frame(HEADERS, END_HEADERS | END_STREAM, 5, &expected())]);
    assert_eq!(run(&input, &[]), Ok(output));
}

#[test]
fn a_trailer_gets_no_authority() {
    let trailer = block(&[("x-end", "1")]);
    let input = connection(&[frame(HEADERS, END_HEADERS | END_STREAM, 1, &trailer)]);
    assert_eq!(run(&input, &[]), Ok(input.clone()));
}

#[test]
fn a_long_block_comes_out_in_frames_that_the_server_takes() {
    let long = "x".repeat(12_000);
    let fields = [("a", long.as_str()), ("b", long.as_str()), ("c", long.as_str())];
    let whole = block(&fields);
    let mut frames = Vec::new();
    for (at, piece) in whole.chunks(10_000).enumerate() {
        let kind = if at == 0 { HEADERS } else { CONTINUATION };
        let last = if (at + 1) * 10_000 >= whole.len() { END_HEADERS } else { 0 };
        frames.push(frame(kind, last, 1, piece));
    }
    let output = run(&connection(&frames), &[]).expect("a valid connection");
    let mut rest = &output[PREFACE.len()..];
    let mut joined = Vec::new();
    while !rest.is_empty() {
        let len = usize::from(rest[1]) << 8 | usize::from(rest[2]);
        assert!(rest[0] == 0 && len <= FRAME_MAX);
        joined.extend_from_slice(&rest[FRAME_HEADER..FRAME_HEADER + len]);
        rest = &rest[FRAME_HEADER + len..];
    }
    assert_eq!(joined, whole);
}

#[test]
fn what_cannot_be_followed_is_refused_for_good() {
    let check = |input: &[u8], error: FrontError| {
        assert_eq!(run(input, &[]), Err(error));
        assert_eq!(run(input, &vec![1; input.len()]), Err(error));
    };
    check(b"GET / HTTP/1.1\r\n\r\n", FrontError::NoPreface);
    check(
        &connection(&[frame(HEADERS, 0, 1, &[]), frame(0, 0, 1, &[])]),
        FrontError::Interrupted { stream: 1 },
    );
    check(
        &connection(&[frame(HEADERS, 0, 1, &[]), frame(CONTINUATION, 0, 3, &[])]),
        FrontError::Interrupted { stream: 3 },
    );
    check(&connection(&[frame(CONTINUATION, 0, 3, &[])]), FrontError::Interrupted { stream: 3 });
    check(&connection(&[frame(HEADERS, PADDED, 1, &[9, 0])]), FrontError::Padding);
    check(&connection(&[frame(HEADERS, PRIORITY, 1, &[0; 4])]), FrontError::Padding);
    check(
        &connection(&[frame(HEADERS, END_HEADERS, 1, &[0; FRAME_MAX + 1])]),
        FrontError::FrameTooLong { len: FRAME_MAX + 1 },
    );
    check(
        &connection(&[frame(HEADERS, END_HEADERS, 1, &[0xff])]),
        FrontError::Block(HpackError::Truncated),
    );
    let mut flood = vec![frame(HEADERS, 0, 1, &[])];
    flood.extend((0..=CONTINUATIONS_MAX).map(|_| frame(CONTINUATION, 0, 1, &[])));
    check(&connection(&flood), FrontError::BlockTooLong);
    let mut long = vec![frame(HEADERS, 0, 1, &[0; FRAME_MAX])];
    long.extend((0..4).map(|_| frame(CONTINUATION, 0, 1, &[0; FRAME_MAX])));
    check(&connection(&long), FrontError::BlockTooLong);

    let mut front = Front::default();
    let mut out = Vec::new();
    assert_eq!(front.advance(b"X", &mut out), Err(FrontError::NoPreface));
    assert_eq!(front.advance(b"PRI", &mut out), Err(FrontError::NoPreface));
}

#[test]
fn many_small_blocks_of_one_large_entry_do_not_pile_up() {
    let mut first = vec![0x40];
    let mut large = Vec::new();
    hpack::encode(&field("a", &"x".repeat(3_900)), &mut large);
    first.extend_from_slice(&large[1..]);
    let mut frames = vec![frame(HEADERS, END_HEADERS, 1, &first)];
    frames.extend((0..1_000).map(|n| frame(HEADERS, END_HEADERS, 3 + 2 * n, &[0xbe; 16])));
    let input = connection(&frames);

    let mut front = Front::default();
    let mut rest = input.as_slice();
    while !rest.is_empty() {
        let mut out = Vec::new();
        let taken = front.advance(rest, &mut out).expect("a valid connection");
        assert!(out.len() <= taken + LIST_MAX + 4 * FRAME_HEADER, "{} of {taken}", out.len());
        rest = &rest[taken..];
    }
}

/// Header blocks of a connection, decoded in order with one decoder.
fn headers(connection: &[u8]) -> Vec<Vec<(String, String)>> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut decoder = Decoder::new();
    let mut rest = &connection[PREFACE.len()..];
    let mut blocks = Vec::new();
    while !rest.is_empty() {
        let len = usize::from(rest[1]) << 8 | usize::from(rest[2]);
        if rest[3] == HEADERS {
            let payload = &rest[FRAME_HEADER..FRAME_HEADER + len];
            let fields = decoder.decode(payload, LIST_MAX).expect("a valid block");
            blocks.push(fields.iter().map(|f| (text(&f.name), text(&f.value))).collect());
        }
        rest = &rest[FRAME_HEADER + len..];
    }
    blocks
}

#[test]
fn of_what_grpc_go_writes_only_the_authority_changes() {
    let sent = include_bytes!("../../golden/grpc-go-1.67-client.bin");
    let output = run(sent, &[]).expect("a valid connection");
    assert_eq!(run(sent, &vec![1; sent.len()]), Ok(output.clone()));
    let before = headers(sent);
    assert_eq!(before.len(), 6);
    for (before, after) in before.iter().zip(headers(&output)) {
        assert_eq!(before.len(), after.len());
        for ((name, before), (after_name, after)) in before.iter().zip(&after) {
            assert_eq!(name, after_name);
            if name == ":authority" {
                assert_eq!(
                    (before.as_str(), after.as_str()),
                    ("%2Fetc%2Fkubeedge%2Fdmi.sock", "localhost")
                );
            } else {
                assert_eq!(before, after);
            }
        }
    }
}

fn frames() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let payload = || prop::collection::vec(any::<u8>(), 0..300);
    let other = (any::<u8>(), any::<u8>(), any::<u32>(), payload()).prop_map(
        |(kind, flags, stream, payload)| {
            let kind = if kind == HEADERS || kind == CONTINUATION { 0 } else { kind };
            frame(kind, flags, stream & 0x7fff_ffff, &payload)
        },
    );
    let text = "[ -~]{0,40}";
    let headers =
        (prop::collection::vec((text, text), 0..8), 1_u32..1000).prop_map(|(fields, stream)| {
            let fields: Vec<_> =
                fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            frame(HEADERS, END_HEADERS, stream, &block(&fields))
        });
    prop::collection::vec(prop_oneof![other, headers], 0..12)
}

proptest! {
    #[test]
    fn how_the_bytes_are_cut_does_not_matter(frames in frames(), cuts in prop::collection::vec(1_usize..50, 0..200)) {
        let input = connection(&frames);
        // No field is named `:authority`, so what comes out is what went in.
        prop_assert_eq!(run(&input, &[]), Ok(input.clone()));
        prop_assert_eq!(run(&input, &cuts), Ok(input));
    }

    #[test]
    fn any_bytes_are_passed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..600), cuts in prop::collection::vec(1_usize..50, 0..50)) {
        let _ = run(&bytes, &cuts);
        let mut input = PREFACE.to_vec();
        input.extend_from_slice(&bytes);
        prop_assert_eq!(run(&input, &cuts), run(&input, &[]));
    }

    #[test]
    fn mangled_header_frames_are_passed_or_refused(
        kinds in prop::collection::vec((prop_oneof![Just(HEADERS), Just(CONTINUATION)], any::<u8>(), 1_u32..4, prop::collection::vec(any::<u8>(), 0..80)), 1..12)
    ) {
        let frames: Vec<_> = kinds.iter().map(|(kind, flags, stream, payload)| frame(*kind, *flags, *stream, payload)).collect();
        let _ = run(&connection(&frames), &[]);
    }
}
