//! `skerry-init`: PID 1 of the appliance, and the small programs that live in the same file.
//!
//! By its name, or by its first argument: `modprobe`, the CNI plugins `bridge`, `host-local`, `loopback` and `portmap`,
//! `network`. As process 1: the first stage, which goes on as `stage1`; `resume` is the second stage again after a
//! failure of its own.
//!
//! A panic never ends process 1. In the first stage it is an emergency: the machine starts again, which counts as a
//! try. In the second stage the program executes itself again and goes on with the services that run, at most
//! [`RESUMES_MAX`] times, then the machine starts again in order. A panic of another thread stops that thread only.

use skerry_init::console::{Console, Problem, Word};
use skerry_init::kernel::{Ending, Kernel};
use skerry_init::linux::{self, Linux};
use skerry_init::stage0::{self, Handover};
use skerry_init::stage1::{self, HANDOVER, Owner, PROGRAM};
use skerry_init::{cni, modprobe, network};
use std::process::ExitCode;
use std::time::Duration;

/// Starts of the second stage by itself in one boot.
const RESUMES_MAX: u32 = 5;
/// The words of the first stage are no longer than this.
const HANDOVER_LEN_MAX: usize = 64 * 1024;

static KERNEL: Linux = Linux;

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let program = arguments.next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default().to_owned();
    let arguments: Vec<String> = arguments.collect();
    let is_init = std::process::id() == 1;
    match (name.as_str(), arguments.first().map(String::as_str)) {
        ("modprobe", _) => run_modprobe(&arguments),
        (plugin @ ("bridge" | "host-local" | "loopback" | "portmap"), _) => cni::run(plugin),
        (_, Some("modprobe")) => run_modprobe(&arguments[1..]),
        (_, Some("network")) => network::run(),
        (_, Some("stage1")) if is_init => {
            let handover = arguments.get(1).and_then(|json| serde_json::from_str(json).ok());
            run_stage1(handover.unwrap_or_default(), false)
        }
        (_, Some("resume")) if is_init => run_stage1(saved_handover(), true),
        (_, None) if is_init => run_stage0(),
        _ if is_init => run_stage0(), // the kernel passes on words that it does not know
        _ => {
            eprintln!("error: this is process 1 of an appliance");
            eprintln!(
                "hint: as a program it knows `modprobe`, `network` and the names of CNI plugins"
            );
            ExitCode::from(2)
        }
    }
}

fn run_modprobe(arguments: &[String]) -> ExitCode {
    let (code, said) = modprobe::run(&KERNEL, arguments);
    said.iter().for_each(|line| eprintln!("{line}"));
    ExitCode::from(code)
}

fn run_stage0() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        let problem = Problem::new(format!("the first stage failed: {panic}"), "");
        stage0::end(&KERNEL, &Console::new(&KERNEL), &problem);
        wait_for_ever();
    }));
    let console = Console::new(&KERNEL);
    let problem = match stage0::prepare(&KERNEL, &console) {
        Ok(handover) => {
            let json = serde_json::to_string(&handover).expect("texts and numbers");
            let error = KERNEL.exec(&[PROGRAM, "stage1", &json]);
            Problem::new(
                format!("could not start the second stage: {error}"),
                "the root is of another version; flash the disk again",
            )
        }
        Err(stage0::Emergency(problem)) => problem,
    };
    stage0::end(&KERNEL, &console, &problem);
    wait_for_ever()
}

fn run_stage1(handover: Handover, resumed: bool) -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        let console = Console::new(&KERNEL);
        if std::thread::current().name() != Some("main") {
            console.say(Word::Problem, format_args!("a part of init failed: {panic}"));
            wait_for_ever();
        }
        console.say(Word::Emergency, format_args!("init failed and goes on: {panic}"));
        let mut handover = saved_handover();
        handover.resumed += 1;
        let again = handover.resumed <= RESUMES_MAX;
        if let (true, Ok(json)) = (again, serde_json::to_vec(&handover)) {
            let _ = KERNEL.write(HANDOVER, &json, 0o600);
            KERNEL.sleep(Duration::from_secs(1));
            let error = KERNEL.exec(&[PROGRAM, "resume"]);
            console.say(Word::Emergency, format_args!("it could not: {error}"));
        }
        KERNEL.sync();
        let error = KERNEL.end(Ending::Reboot);
        console.say(Word::Emergency, format_args!("could not start again: {error}"));
        wait_for_ever();
    }));
    // Before any thread: each would take signals away from the loop.
    let signals = linux::signals().ok();
    // For ever: the loop and its threads live as long as the machine.
    let console: &'static Console<'static> = Box::leak(Box::new(Console::new(&KERNEL)));
    let machine = match resumed {
        false => stage1::set_up(&KERNEL, console, handover),
        true => stage1::take_up(&KERNEL, console, handover),
    };
    let mut owner = Owner::new(machine);
    if resumed {
        owner.resume();
    }
    owner.run(signals);
    wait_for_ever()
}

fn saved_handover() -> Handover {
    let bytes = KERNEL.read(HANDOVER, HANDOVER_LEN_MAX).unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// Process 1 must not return: the kernel would panic. The watchdog is not petted any more.
fn wait_for_ever() -> ! {
    loop {
        KERNEL.sleep(Duration::from_secs(3600));
    }
}
