//! Attention over pages, on the CPU.

pub mod attention;
