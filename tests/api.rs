//! The public API, as api.txt has it (`bash .ci/api` compares that with the code).

use std::{fs, path::Path};

#[test]
fn no_public_type_says_how_it_is_sent() {
    let api = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../api.txt")).unwrap();
    let sent: Vec<_> = api.lines().filter(|line| line.contains("serde")).collect();
    assert!(api.contains("pub struct fbuf_client::Client"), "the file is another one");
    assert!(
        sent.is_empty(),
        "types of the wire belong into `fbuf_protocol::wire` or `fbuf_core::socket::forms`: {sent:#?}"
    );
}
