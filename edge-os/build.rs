//! Compiles the reduced runtime interface in `proto/` without a protobuf compiler on the machine.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("proto");
    println!("cargo:rerun-if-changed=proto");
    let names = [
        "cri.proto",
        "containerd_events.proto",
        "containerd_content.proto",
        "containerd_images.proto",
        "containerd_leases.proto",
    ];
    let files = protox::compile(names, [&proto])?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(false)
        .build_transport(false)
        .btree_map(".")
        .compile_fds(files)?;
    Ok(())
}
