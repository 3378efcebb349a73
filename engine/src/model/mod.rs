//! The model: configuration, loading, and the decoder that engine and trainer share.

pub mod attention;
pub mod checkpointing;
pub mod config;
pub mod decoder;
pub mod joined;
pub mod loading;
pub mod rope;
