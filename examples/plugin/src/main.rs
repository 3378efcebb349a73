//! The command `onpolicy` with a verifier, a token gate and an engine more.
//!
//! ```text
//! cargo run --release --manifest-path examples/plugin/Cargo.toml -- train --model ... \
//!     --set verifier.name=brief --set verifier.words=5 --set gate.name=surprise \
//!     --engine parrot --set engine.options.vocab_size=49152 --set 'engine.options.lines=[[1], [2, 3]]'
//! ```

mod brief;
mod parrot;
mod surprise;

use std::process::ExitCode;

fn main() -> ExitCode {
    onpolicy::main(|plugins| {
        plugins
            .with_verifier("brief", |options| options.parse::<brief::Brief>())
            .with_engine("parrot", |options| options.parse::<parrot::Parrot>())
            .with_gate("surprise", |options| options.parse::<surprise::Surprise>())
    })
}
