//! The model: configuration, loading, decoder.

pub mod config;
pub mod decoder;
pub mod loading;
