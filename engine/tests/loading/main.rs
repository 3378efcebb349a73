//! Loading of real and of small random checkpoints, in every format, and of damaged ones.

mod directory;
mod gguf;
mod gguf_file;
mod smollm2;
mod support;
