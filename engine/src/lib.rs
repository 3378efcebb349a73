//! The policy, and serving it.
//!
//! # Layout
//! In the order that a request's data flows:
//! - [`http`]: the OpenAI-compatible routes.
//! - [`chat`]: tokenizer, chat template, incremental detokenizer.
//! - [`engine`]: the handle, and the loop: schedule, run, sample, deliver.
//! - [`collect`]: groups of samples gathered in memory, for callers in the same process.
//! - [`sequence`]: one sample: tokens, block table, progress.
//! - [`scheduler`]: waiting and running sequences become the next batch. No tensors.
//! - [`draft`]: guesses at the tokens that follow. No tensors.
//! - [`block_manager`]: blocks, reference counts, prefix hashes. No tensors.
//! - [`kv_cache`]: the paged K and V tensors.
//! - [`model`]: configuration, loading, the decoder that engine and trainer share.
//! - [`ops`]: the decoder's operations, with gradients. [`kernels`]: what they and attention over
//!   pages are computed with.
//! - [`cuda`]: the same on a GPU: kernels of our own, compiled while the program runs.
//! - [`device`]: the same on other devices and in other types, in libtorch's operations.
//! - [`logits`]: logits to log-prob, entropy, discriminator, baseline.
//! - [`grammar`]: what a sample's text must be, and which tokens may come next.
//! - [`sampler`]: logits to the next token.
//! - [`head`]: hidden states to the next token, without logits in memory where none is needed.
//! - [`remote`]: vLLM or SGLang servers elsewhere, as an engine.
//! - [`profile`]: where the engine's time goes, by phase of a step.
//! - [`in_place`]: updates of the weights that engine and trainer share.
//! - [`weights`]: the shared policy: names, version, exclusive update between two steps.
//! - [`torch`]: what tch does not bind.

pub mod block_manager;
pub mod chat;
pub mod collect;
pub mod cuda;
pub mod device;
pub mod draft;
pub mod engine;
pub mod grammar;
pub mod head;
pub mod http;
pub mod in_place;
pub mod kernels;
pub mod kv_cache;
pub mod logits;
#[cfg(feature = "mistralrs")]
pub mod mistral;
pub mod model;
pub mod ops;
pub mod panic;
pub mod profile;
pub mod remote;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod torch;
pub mod weights;
