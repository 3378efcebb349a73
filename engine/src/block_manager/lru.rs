//! A set of blocks in the order in which they entered, with removal from the middle in O(1).

/// Marks a block that is not in the list.
const ABSENT: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Link {
    older: u32,
    newer: u32,
}

/// A doubly linked list threaded through an array; the entry past the last block is its two ends.
#[derive(Debug)]
pub(super) struct Lru {
    links: Vec<Link>,
    len: usize,
}

impl Lru {
    pub fn new(num_blocks: usize) -> Self {
        let mut links = vec![Link { older: ABSENT, newer: ABSENT }; num_blocks + 1];
        let ends = num_blocks as u32;
        links[num_blocks] = Link { older: ends, newer: ends };
        Self { links, len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn contains(&self, block: u32) -> bool {
        self.links[block as usize].newer != ABSENT
    }

    /// Adds a block that is not in the list.
    pub fn push_newest(&mut self, block: u32) {
        debug_assert!(!self.contains(block));
        let ends = self.ends();
        let newest = self.links[ends as usize].older;
        self.links[block as usize] = Link { older: newest, newer: ends };
        self.links[newest as usize].newer = block;
        self.links[ends as usize].older = block;
        self.len += 1;
    }

    /// Takes out a block that is in the list.
    pub fn remove(&mut self, block: u32) {
        debug_assert!(self.contains(block));
        let Link { older, newer } = self.links[block as usize];
        self.links[older as usize].newer = newer;
        self.links[newer as usize].older = older;
        self.links[block as usize] = Link { older: ABSENT, newer: ABSENT };
        self.len -= 1;
    }

    pub fn pop_oldest(&mut self) -> Option<u32> {
        let oldest = self.links[self.ends() as usize].newer;
        (oldest != self.ends()).then(|| {
            self.remove(oldest);
            oldest
        })
    }

    fn ends(&self) -> u32 {
        (self.links.len() - 1) as u32
    }
}
