//! Salts: who shares KV with whom.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

/// Keys of the process, which nobody outside can know.
static KEYS: LazyLock<[RandomState; 2]> =
    LazyLock::new(|| [RandomState::new(), RandomState::new()]);

/// Stands for a request's salt; requests without one have the default. It is a keyed hash of 128
/// bits, so two salts are never the same in practice, and no client can look for two that are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Salt([u64; 2]);

impl Salt {
    /// That of a text.
    pub fn of(text: &str) -> Self {
        Self([0, 1].map(|i| KEYS[i].hash_one(text)))
    }

    pub(crate) fn low_bits(self) -> u64 {
        self.0[0]
    }
}
