//! The command `onpolicy` with a verifier and a token gate more.
//!
//! ```text
//! cargo run --release --manifest-path examples/plugin/Cargo.toml -- train --model ... \
//!     --set verifier.name=brief --set verifier.words=5 --set gate.name=surprise
//! ```

mod brief;
mod surprise;

use std::process::ExitCode;

fn main() -> ExitCode {
    onpolicy::main(|plugins| {
        plugins
            .with_verifier("brief", |options| options.parse::<brief::Brief>())
            .with_gate("surprise", |options| options.parse::<surprise::Surprise>())
    })
}
