//! A loopback relay between an edge node and the hub that can be cut and healed, as a bad link would.
//!
//! It listens on one port per target and looks the target up at each connection. A cut ends what is open and refuses
//! what is new until the link is healed.

use anyhow::Result;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// Where the relay connects to at this moment; `None` while nobody listens yet.
pub(crate) type Target = Box<dyn Fn() -> Option<SocketAddr> + Send>;

/// A relay; it ends with the program.
pub(crate) struct Relay {
    /// Listening addresses, in the order of the targets.
    pub(crate) addresses: Vec<SocketAddr>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    cut: bool,
    open: Vec<TcpStream>,
}

impl Relay {
    /// Starts to listen on a free port per target.
    pub(crate) fn start(targets: Vec<Target>) -> Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        let mut addresses = Vec::new();
        for target in targets {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            addresses.push(listener.local_addr()?);
            let state = Arc::clone(&state);
            std::thread::spawn(move || {
                for edge in listener.incoming().flatten() {
                    if let Some(hub) = target().and_then(|hub| TcpStream::connect(hub).ok()) {
                        join(edge, hub, &state);
                    }
                }
            });
        }
        Ok(Self { addresses, state })
    }

    /// Ends every connection and refuses new ones.
    pub(crate) fn cut(&self) {
        let mut state = self.state.lock().expect("no holder panics");
        state.cut = true;
        for stream in state.open.drain(..) {
            // Already closed by its owner is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Lets connections through again.
    pub(crate) fn heal(&self) {
        self.state.lock().expect("no holder panics").cut = false;
    }
}

fn join(edge: TcpStream, hub: TcpStream, state: &Mutex<State>) {
    let mut state = state.lock().expect("no holder panics");
    if state.cut {
        return;
    }
    for (from, to) in [(&edge, &hub), (&hub, &edge)] {
        let (Ok(from), Ok(to), Ok(handle)) = (from.try_clone(), to.try_clone(), from.try_clone())
        else {
            return;
        };
        state.open.push(handle);
        std::thread::spawn(move || copy(from, to));
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    // Either end may have closed both directions already.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
