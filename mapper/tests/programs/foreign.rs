//! Devices and brokers that are not ours, as programs.

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A program that ends with the test.
pub(crate) struct Running {
    child: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The Python with pymodbus.
fn python() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a room of the tree");
    let python = root.join("target/tools/pymodbus-3.16.1/bin/python");
    assert!(python.exists(), "no pymodbus here\nhint: `cargo xtask setup --tests` installs it");
    python
}

/// Starts the Modbus server; returns what it prints, the port or the terminal.
pub(crate) fn modbus(arguments: &[&str]) -> (Running, String) {
    let python = python();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/modbus_server.py");
    let mut child = Command::new(python)
        .arg(script)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut line).unwrap();
    assert!(!line.is_empty(), "the Modbus server did not start");
    (Running { child }, line.trim().to_owned())
}

/// A port that nobody listens on now.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Starts mosquitto on a port.
pub(crate) fn mosquitto(directory: &Path, port: u16) -> Running {
    let find = |name: &str| Command::new(name).arg("-h").stdout(Stdio::null()).spawn().ok();
    let program = ["mosquitto", "/usr/sbin/mosquitto"].into_iter().find(|name| match find(name) {
        Some(mut child) => child.wait().is_ok(),
        None => false,
    });
    let program =
        program.expect("no mosquitto here\nhint: `cargo xtask setup --tests` installs it");
    let config = directory.join(format!("mosquitto-{port}.conf"));
    std::fs::write(&config, format!("listener {port} 127.0.0.1\nallow_anonymous true\n")).unwrap();
    let child = Command::new(program).arg("-c").arg(config).stderr(Stdio::null()).spawn().unwrap();
    let running = Running { child };
    let end = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < end, "mosquitto does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    running
}
