//! Problems drawn from a seed and an index.

use super::wording::Common;
use onpolicy_plugin_api::{Options, Problem, TaskSource};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::de::DeserializeOwned;

/// From this many different problems on, some of them are held out.
const SMALLEST_SPLIT: u128 = 1000;
/// One problem in this many is held out.
const HELD_OUT: u64 = 16;
/// Seed of the held-out stream. It is fixed, so that runs with different seeds are judged by the
/// same problems.
const EVAL_SEED: u64 = 0x6576_616c;

/// A problem before it is worded as a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// What is asked.
    pub question: String,
    /// The reference answer.
    pub answer: String,
    /// Names the problem: two drafts with the same key are the same problem (`3+5` and `5+3`).
    pub key: String,
}

/// A kind of problem that can be drawn at random. Its fields are the options of the task.
pub trait Recipe: DeserializeOwned + Send + Sync + 'static {
    /// Checks the options.
    ///
    /// # Errors
    /// Names the option that is out of range.
    fn validate(&self) -> Result<(), String>;

    /// Draws a problem.
    fn draw(&self, rng: &mut ChaCha8Rng) -> Draft;

    /// A lower bound of the number of different keys.
    fn space(&self) -> u128;
}

/// An endless task source over a [`Recipe`].
///
/// Problem `index` depends on the seed and the index only. If there are at least 1000 different
/// problems, one in sixteen (picked by a hash of its key) is held out: `eval` draws only those,
/// `train` never does. A smaller space, such as the 100 sums of two one-digit numbers, is not
/// split: `eval` is then a stream of its own over the same problems.
#[derive(Debug, Clone)]
pub struct Generator<R> {
    recipe: R,
    common: Common,
    seed: u64,
}

/// The two streams of problems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Train,
    Eval,
}

impl<R: Recipe> Generator<R> {
    /// Reads the recipe's options and the shared ones ([`Common`]). `seed` is used if the options
    /// name none.
    ///
    /// # Errors
    /// An unknown key, a wrong type or a value out of range.
    pub fn from_options(options: &Options, seed: u64) -> Result<Self, String> {
        let (common, own) = Common::split(options)?;
        let recipe: R = own.parse()?;
        recipe.validate()?;
        let seed = common.seed.unwrap_or(seed);
        Ok(Self { recipe, common, seed })
    }

    fn problem(&self, stream: Stream, index: u64) -> Problem {
        let mut rng = match stream {
            Stream::Train => rng(self.seed, stream, index),
            Stream::Eval => rng(EVAL_SEED, stream, index),
        };
        let split = self.recipe.space() >= SMALLEST_SPLIT;
        loop {
            let draft = self.recipe.draw(&mut rng);
            if !split || is_held_out(&draft.key) == (stream == Stream::Eval) {
                let messages = self.common.messages(&draft.question);
                return Problem { messages, answer: draft.answer };
            }
        }
    }
}

impl<R: Recipe> TaskSource for Generator<R> {
    fn train(&self, index: u64) -> Problem {
        self.problem(Stream::Train, index)
    }

    fn eval(&self, index: u64) -> Option<Problem> {
        Some(self.problem(Stream::Eval, index))
    }
}

/// A generator of its own for every seed, stream and index.
fn rng(seed: u64, stream: Stream, index: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&index.to_le_bytes());
    key[16] = stream as u8;
    ChaCha8Rng::from_seed(key)
}

fn is_held_out(key: &str) -> bool {
    stable_hash(key.as_bytes()).is_multiple_of(HELD_OUT)
}

/// A hash that is the same on every machine and in every version: FNV-1a, then an avalanche step,
/// for its low bits alone are weak.
pub(super) fn stable_hash(bytes: &[u8]) -> u64 {
    let fnv = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    mix(fnv)
}

/// A bijection of u64 in which every input bit reaches every output bit (SplitMix64's finisher).
pub(super) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
