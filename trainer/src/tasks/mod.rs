//! The built-in tasks.
//!
//! - [`generator`]: problems drawn from a seed and an index, split into training and held-out.
//! - [`arithmetic`]: sums, products and chains.
//! - [`countdown`]: reach a target with given numbers.
//! - [`jsonl`]: problems from a file.
//! - [`wording`]: the prompt template and the system message that every task understands.

pub mod arithmetic;
pub mod countdown;
pub mod generator;
pub mod jsonl;
pub mod wording;

mod permutation;

pub use generator::Generator;
