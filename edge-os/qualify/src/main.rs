//! `skerry-qualify`: one static program that says what this box, or a kernel's configuration, can carry.
//!
//! Exit codes: 0 every profile asked for is qualified, 1 one is not, 2 it could not be told.

fn main() -> std::process::ExitCode {
    skerry_qualify::command::run(&[], std::env::args().skip(1))
}
