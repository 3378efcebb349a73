//! The command `onpolicy`.

use std::process::ExitCode;

fn main() -> ExitCode {
    onpolicy::main(|plugins| plugins)
}
