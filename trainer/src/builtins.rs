//! The built-in plug-ins, by the names that a configuration file uses.

use crate::{
    entropy::{ClipB, ClipV, KeepAll},
    tasks::{
        Generator,
        arithmetic::{Chain, Product, Sum},
        countdown::Countdown as CountdownTask,
        jsonl::Jsonl,
    },
    verifiers::{
        boxed::Boxed, countdown::Countdown, exact::Exact, http::Http, judge::Judge, numeric,
    },
};
use onpolicy_plugin_api::Plugins;

/// Adds the built-ins to `plugins`. Problems are drawn with `seed` unless a task's own `seed`
/// option says otherwise. Whatever is added afterwards replaces a built-in of the same name.
///
/// - tasks: `sum`, `product`, `chain`, `countdown`, `jsonl`
/// - verifiers: `last_integer`, `exact`, `gsm8k`, `boxed`, `countdown`, `http`, `judge`
/// - gates: `clip_b`, `clip_v`, `none`
#[must_use]
pub fn register(plugins: Plugins, seed: u64) -> Plugins {
    plugins
        .with_task("sum", move |options| Generator::<Sum>::from_options(options, seed))
        .with_task("product", move |options| Generator::<Product>::from_options(options, seed))
        .with_task("chain", move |options| Generator::<Chain>::from_options(options, seed))
        .with_task("countdown", move |options| {
            Generator::<CountdownTask>::from_options(options, seed)
        })
        .with_task("jsonl", move |options| Jsonl::from_options(options, seed))
        .with_verifier("last_integer", numeric::LastInteger::from_options)
        .with_verifier("gsm8k", numeric::Gsm8k::from_options)
        .with_verifier("exact", Exact::from_options)
        .with_verifier("boxed", Boxed::from_options)
        .with_verifier("countdown", Countdown::from_options)
        .with_verifier("http", Http::from_options)
        .with_verifier("judge", Judge::from_options)
        .with_gate("clip_b", ClipB::from_options)
        .with_gate("clip_v", ClipV::from_options)
        .with_gate("none", KeepAll::from_options)
}
