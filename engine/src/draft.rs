//! Guesses at the tokens that follow, from what followed the same tokens before.
//!
//! For contexts of one, two, four and eight tokens a table keeps which token came next and how
//! surely; the longest context that knows something guesses, and its guess is the end of the next
//! context. A context must hold a token that is none of these guesses: chance alone would go on
//! forever, and rows are not quite free. Whatever is generated or asked teaches, so the samples of a
//! group, later requests and later steps of training with the same problems profit from each
//! other. A guess costs a few memory accesses, whatever the length of the text, and the memory is
//! fixed.
//!
//! A wrong guess costs nothing but its row in a step: tokens are drawn as if nobody had guessed.

use crate::block_manager::{Salt, fold};

/// Lengths of the contexts.
const CONTEXTS: [usize; 4] = [1, 2, 4, 8];

/// The longest of them.
const LONGEST: usize = CONTEXTS[CONTEXTS.len() - 1];

/// Entries of the table of one length of context; a power of two.
const ENTRIES: usize = 1 << 16;

/// How sure an entry can become.
const SUREST: u16 = 3;

/// How sure the entry of a longer context must be to stand before that of a shorter one.
const SURE: u16 = 2;

/// What followed the contexts of one hash.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// The token.
    next: u32,
    /// Bits of the context's hash that do not choose the entry.
    tag: u16,
    /// 0: nothing is known.
    surety: u16,
}

impl Entry {
    fn knows(&self, tag: u16) -> bool {
        self.surety > 0 && self.tag == tag
    }

    /// Takes note of what followed a context: two surprises make it forget a sure token.
    fn learn(&mut self, tag: u16, next: u32) {
        if self.knows(tag) && self.next == next {
            self.surety = SUREST.min(self.surety + 1);
        } else if self.surety > 1 {
            self.surety -= 1;
        } else {
            *self = Self { next, tag, surety: 1 };
        }
    }
}

/// What followed which tokens.
#[derive(Debug, Clone)]
pub struct Drafter {
    tables: [Vec<Entry>; CONTEXTS.len()],
}

impl Default for Drafter {
    fn default() -> Self {
        Self { tables: [(); CONTEXTS.len()].map(|()| vec![Entry::default(); ENTRIES]) }
    }
}

impl Drafter {
    /// Learns what follows what in `tokens`, from `start` on. Only guesses of the same salt are
    /// made of it.
    pub fn learn(&mut self, salt: Salt, tokens: &[u32], start: usize) {
        for at in start.max(1)..tokens.len() {
            for (table, length) in self.tables.iter_mut().zip(CONTEXTS) {
                let Some(from) = at.checked_sub(length) else { break };
                let (place, tag) = place_of(salt, &tokens[from..at]);
                table[place].learn(tag, tokens[at]);
            }
        }
    }

    /// Guesses up to `most` tokens that follow `tokens`; fewer where nothing is known.
    pub fn guess(&self, salt: Salt, tokens: &[u32], most: usize) -> Vec<u32> {
        let known = tokens.len().min(LONGEST);
        let mut text = tokens[tokens.len() - known..].to_vec();
        for guesses in 0..most {
            let Some(next) = self.next(salt, &text, guesses) else { break };
            text.push(next);
        }
        text.split_off(known)
    }

    /// The likeliest token after `text`, which ends in so many guesses, if anything like it was seen.
    fn next(&self, salt: Salt, text: &[u32], guesses: usize) -> Option<u32> {
        let contexts = self.tables.iter().zip(CONTEXTS).rev();
        let contexts = contexts.take_while(|(_, length)| *length > guesses);
        let known = contexts.filter_map(|(table, length)| {
            let (place, tag) = place_of(salt, &text[text.len().checked_sub(length)?..]);
            Some(table[place]).filter(|entry| entry.knows(tag))
        });
        let mut known = known.peekable();
        let longest = *known.peek()?;
        let sure = known.find(|entry| entry.surety >= SURE);
        Some(sure.unwrap_or(longest).next)
    }

    /// Forgets everything.
    pub fn forget(&mut self) {
        self.tables.iter_mut().for_each(|table| table.fill(Entry::default()));
    }
}

/// Which entry is a context's, and its tag there.
fn place_of(salt: Salt, context: &[u32]) -> (usize, u16) {
    let words = context.iter().map(|&token| u64::from(token));
    let hash = words.fold(salt.low_bits(), fold);
    (hash as usize % ENTRIES, (hash >> 48) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: [u32; 0] = [];

    fn taught(texts: &[&[u32]]) -> Drafter {
        let mut drafter = Drafter::default();
        texts.iter().for_each(|text| drafter.learn(Salt::default(), text, 0));
        drafter
    }

    fn guess(drafter: &Drafter, text: &[u32], most: usize) -> Vec<u32> {
        drafter.guess(Salt::default(), text, most)
    }

    #[test]
    fn what_was_seen_is_guessed_on_and_on() {
        let text: Vec<u32> = (1..20).collect();
        let drafter = taught(&[&text]);
        assert_eq!(guess(&drafter, &text[..9], 12), (10..18).collect::<Vec<_>>());
        assert_eq!(guess(&drafter, &text[..9], 3), [10, 11, 12]);
        assert_eq!(guess(&drafter, &text[..17], 7), [18, 19], "nothing followed the end");
        assert_eq!(guess(&drafter, &[4], 7), [5, 6], "from 5, 6 nothing is told");
        assert_eq!(guess(&drafter, &[70], 7), NOTHING);
        assert_eq!(guess(&drafter, &[], 7), NOTHING);
        assert_eq!(guess(&drafter, &[1], 0), NOTHING);
        assert_eq!(guess(&taught(&[&[5, 8, 5, 8, 5, 8]]), &[8, 5], 4), [8, 5, 8, 5]);
    }

    #[test]
    fn a_longer_context_knows_better() {
        let drafter = taught(&[&[1, 2, 7], &[3, 2, 8], &[1, 2, 7], &[3, 2, 8]]);
        assert_eq!(guess(&drafter, &[1, 2], 1), [7]);
        assert_eq!(guess(&drafter, &[3, 2], 1), [8]);
    }

    #[test]
    fn a_sure_token_outlives_one_surprise() {
        let mut drafter = taught(&[&[1, 2], &[1, 2], &[1, 2], &[1, 9]]);
        assert_eq!(guess(&drafter, &[1], 1), [2]);
        for _ in 0..2 {
            drafter.learn(Salt::default(), &[1, 9], 0);
        }
        assert_eq!(guess(&drafter, &[1], 1), [9]);
    }

    #[test]
    fn only_what_is_new_is_learnt() {
        let mut drafter = Drafter::default();
        drafter.learn(Salt::default(), &[1, 2, 3], 2);
        assert_eq!(guess(&drafter, &[1], 1), NOTHING);
        assert_eq!(guess(&drafter, &[2], 1), [3]);
    }

    #[test]
    fn salts_do_not_learn_from_each_other() {
        let (mut drafter, other) = (Drafter::default(), Salt::of("other"));
        drafter.learn(other, &[1, 2, 3], 0);
        assert_eq!(guess(&drafter, &[1], 2), NOTHING);
        assert_eq!(drafter.guess(other, &[1], 2), [2, 3]);
        drafter.forget();
        assert_eq!(drafter.guess(other, &[1], 2), NOTHING);
    }
}
