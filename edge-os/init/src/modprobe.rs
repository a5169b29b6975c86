//! `modprobe`: the kernel and other programs call it with aliases.
//!
//! `modprobe [-q] [--] NAME…`: a module or an alias, several of them. Removing modules is refused: what a pod uses may
//! depend on it, and nobody on an appliance knows better. Options that change only what is said are accepted.
//!
//! Exit codes are kmod's: 0 when all are there, 1 otherwise.

use crate::console::chain;
use crate::kernel::Kernel;
use crate::modules::{ModuleError, Modules};

/// What the words ask for.
#[derive(Debug, PartialEq, Eq)]
enum Order {
    Load { names: Vec<String>, quiet: bool },
    Refuse(String),
}

/// Carries out one call; `arguments` come after the program's name. Returns the exit code and what to say.
pub fn run(kernel: &dyn Kernel, arguments: &[String]) -> (u8, Vec<String>) {
    let (names, quiet) = match read(arguments) {
        Order::Load { names, quiet } => (names, quiet),
        Order::Refuse(why) => return (1, vec![format!("modprobe: {why}")]),
    };
    let modules = match Modules::open(kernel) {
        Ok(modules) => modules,
        Err(error) => return (1, vec![format!("modprobe: {}", chain(&error))]),
    };
    let mut said = Vec::new();
    let mut code = 0;
    for name in &names {
        if let Err(error) = modules.load(name) {
            code = 1;
            // Quiet is about names that nobody knows; a module that does not load is told anyway.
            if !(quiet && matches!(error, ModuleError::Unknown(_))) {
                said.push(format!("modprobe: {}", chain(&error)));
            }
        }
    }
    (code, said)
}

fn read(arguments: &[String]) -> Order {
    let mut quiet = false;
    let mut all = false;
    let mut names = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--" => {
                names.extend(words.by_ref().cloned());
            }
            "-q" | "--quiet" | "-qa" | "-aq" => {
                quiet = true;
                all |= word.contains('a');
            }
            "-a" | "--all" => all = true,
            "-s" | "--syslog" | "-v" | "--verbose" | "-b" | "--use-blacklist" => {}
            "-r" | "--remove" => {
                return Order::Refuse(
                    "modules are not removed on an appliance; restart it instead".into(),
                );
            }
            option if option.starts_with('-') => {
                return Order::Refuse(format!("unknown option `{option}`"));
            }
            name => names.push(name.to_owned()),
        }
    }
    // Without `-a` what follows the first name are parameters of the module; those are refused, names are taken.
    if let Some(parameter) = names.iter().skip(1).find(|name| name.contains('=')) {
        return Order::Refuse(format!("parameter `{parameter}` cannot be given"));
    }
    let _ = all;
    match names.is_empty() {
        true => Order::Refuse("no module was named".into()),
        false => Order::Load { names, quiet },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recorder::Machine;

    fn call(machine: &Machine, line: &str) -> (u8, Vec<String>) {
        run(machine, &line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    fn machine() -> Machine {
        let machine = Machine::new();
        machine.modules(&[
            ("xt_comment", &[], &["ipt_comment"]),
            ("nfnetlink", &[], &["net-pf-16-proto-12"]),
            ("overlay", &[], &["fs-overlay"]),
        ]);
        machine
    }

    #[test]
    fn kernel_and_iptables_get_what_they_call_for() {
        let machine = machine();
        assert_eq!(call(&machine, "-q -- net-pf-16-proto-12"), (0, vec![]));
        assert_eq!(call(&machine, "-q ipt_comment"), (0, vec![]));
        assert_eq!(call(&machine, "-a overlay xt-comment"), (0, vec![]));
        assert_eq!(machine.loaded(), ["nfnetlink", "xt_comment", "overlay", "xt_comment"]);
    }

    #[test]
    fn unknown_names_are_1_and_quiet_says_nothing() {
        let machine = machine();
        assert_eq!(call(&machine, "-q -- bpf_preload"), (1, vec![]));
        let (code, said) = call(&machine, "bpf_preload");
        assert_eq!((code, said.len()), (1, 1));
        machine.fail("load overlay", 8);
        let (code, said) = call(&machine, "-q overlay");
        assert_eq!((code, said.len()), (1, 1), "a failure is told even then");
    }

    #[test]
    fn removing_options_parameters_and_nothing_are_refused() {
        let machine = machine();
        for line in ["-r overlay", "--remove overlay", "-x overlay", "overlay a=1", "", "-q"] {
            let (code, said) = call(&machine, line);
            assert_eq!((code, said.len()), (1, 1), "{line}");
        }
        assert!(machine.loaded().is_empty());
    }
}
