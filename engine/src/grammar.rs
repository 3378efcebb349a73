//! What the text of a sample must be: grammars over the model's vocabulary, by llguidance.
//!
//! A request's grammar is compiled once, on its caller's thread; each sample has a place in it of
//! its own, which advances with the sample's tokens and says which may come next.

mod source;
mod vocabulary;

use crate::chat::ChatTokenizer;
use llguidance::{Matcher, ParserFactory, api::ParserLimits, earley::SlicedBiasComputer};
use onpolicy_plugin_api::{EngineError, Grammar};

use std::{
    fmt::Display,
    panic::resume_unwind,
    sync::{Arc, OnceLock},
    thread,
};
use toktrie::{InferenceCapabilities, SimpleVob, TokEnv};

/// Stack of the thread that compiles a grammar, in bytes: rules may stand in long chains.
const STACK: usize = 64 << 20;

/// Compiles grammars for one model.
pub struct Grammars {
    tokenizer: Option<ChatTokenizer>,
    vocab_size: usize,
    eos_token_ids: Vec<u32>,
    /// Made when the first grammar is: the vocabulary as a trie of bytes takes a moment.
    factory: OnceLock<Result<ParserFactory, String>>,
}

impl Grammars {
    /// Those over the vocabulary of `tokenizer`, whose texts end with `eos_token_ids`.
    pub fn new(
        tokenizer: Option<ChatTokenizer>,
        vocab_size: usize,
        eos_token_ids: Vec<u32>,
    ) -> Self {
        Self { tokenizer, vocab_size, eos_token_ids, factory: OnceLock::new() }
    }

    /// Compiles a grammar.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] naming `grammar` if it is malformed, too large, or uses what
    /// llguidance does not know; [`EngineError::Unsupported`] if the engine has no tokenizer or the
    /// model no end-of-sequence token.
    pub fn compile(&self, grammar: &Grammar) -> Result<Place, EngineError> {
        let Some(tokenizer) = &self.tokenizer else {
            return Err(EngineError::unsupported("grammars: it was started without a tokenizer"));
        };
        if self.eos_token_ids.is_empty() {
            let what = "grammars: the model has no end-of-sequence token";
            return Err(EngineError::unsupported(what));
        }
        let source = source::of(grammar).map_err(|why| EngineError::invalid("grammar", why))?;
        let factory = self.factory.get_or_init(|| self.factory(tokenizer));
        let factory = factory.as_ref().map_err(|why| EngineError::Internal(why.clone()))?;
        let parser = on_large_stack(|| factory.create_parser(source))
            .map_err(|why| EngineError::invalid("grammar", source::reason(grammar, why)))?;
        let matcher = Matcher::new(Ok(parser));
        Ok(Place { matcher, allowed: SimpleVob::new() })
    }

    fn factory(&self, tokenizer: &ChatTokenizer) -> Result<ParserFactory, String> {
        let env: TokEnv = Arc::new(vocabulary::of(tokenizer, self.vocab_size, &self.eos_token_ids));
        let (capabilities, slices) =
            (InferenceCapabilities::default(), SlicedBiasComputer::general_slices());
        let mut factory = ParserFactory::new(&env, capabilities, &slices)
            .map_err(|why| format!("the vocabulary cannot be used for grammars: {why}"))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            max_lexer_states: 20_000,
            max_grammar_size: 100_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(factory)
    }
}

/// Calls `work` on a thread with room for deep recursion.
fn on_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("grammar".into()).stack_size(STACK);
        let thread = thread.spawn_scoped(scope, work).expect("a thread can be started");
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// Why a sample cannot go on.
fn stuck(error: impl Display) -> String {
    let why = source::plain(error);
    // How llguidance says that the mask is empty.
    if !why.contains("NoExtension") {
        return why;
    }
    "the model's vocabulary has no token that goes on with the text".into()
}

/// Where a sample stands in its grammar. Clones share what has been worked out about the grammar.
#[derive(Clone)]
pub struct Place {
    matcher: Matcher,
    /// Tokens that may come next.
    allowed: SimpleVob,
}

impl Place {
    /// Works out which tokens may come next: only end-of-sequence ones once nothing may follow.
    ///
    /// # Errors
    /// Why it cannot be told; the sample cannot go on.
    pub fn look(&mut self) -> Result<(), String> {
        self.allowed = self.matcher.compute_mask_or_eos().map_err(stuck)?;
        Ok(())
    }

    /// What [`Place::look`] found: a bit for each token, from the lowest bit of the first word on.
    pub fn allowed(&self) -> &[u32] {
        self.allowed.as_slice()
    }

    /// Whether a token other than these may come next.
    pub fn allows_other_than(&self, ids: &[u32]) -> bool {
        let among =
            |id: &&u32| (**id as usize) < self.allowed.len() && self.allowed.is_allowed(**id);
        let mut ids: Vec<u32> = ids.iter().filter(among).copied().collect();
        ids.sort_unstable();
        ids.dedup();
        self.allowed.num_set() > ids.len()
    }

    /// Takes the token that came next.
    ///
    /// # Errors
    /// The grammar does not allow it.
    pub fn advance(&mut self, token: u32) -> Result<(), String> {
        // At the end of the grammar comes an end-of-sequence token, which ends nothing more.
        if self.matcher.is_stopped() && self.matcher.stop_reason().is_ok() {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(source::plain)
    }
}
