//! block_manager
