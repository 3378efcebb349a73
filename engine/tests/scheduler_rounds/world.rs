//! A scheduler under random load, and the model of what its KV pages hold.
//!
//! The model keeps one number per slot of every block: a digest of the token there, its position,
//! the weight version that computed it, and the digest of the slot before it as the sequence's
//! table has it. Beside the pages, each sequence has a private list of the digests that it should
//! see. A block shared wrongly, written while shared, reused across versions or found under another
//! text's hash makes the two differ.

#[path = "checks.rs"]
mod checks;

use onpolicy_engine::block_manager::BlockHash;
use onpolicy_engine::scheduler::{Chunk, NewRequest, Scheduler, SchedulerConfig, Stats, Step};
use onpolicy_engine::sequence::{Place, SeqId};
use onpolicy_plugin_api::{EngineError, RequestId};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::{BTreeMap, BTreeSet};

const BLOCK: usize = 16;

/// Salts that the model's digests tell apart; the first is none.
const SALTS: [&str; 3] = ["", "a", "b"];

fn digest(before: u64, token: u32, position: usize, version: u64) -> u64 {
    let words = [u64::from(token), position as u64, version];
    words.iter().fold(before, |hash, word| {
        let product = (hash ^ word).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        product ^ (product >> 29)
    })
}

/// The digests of KV computed from start to end by one version for requests of one salt.
fn pure(tokens: &[u32], version: u64, salt: u64) -> Vec<u64> {
    let scan = tokens.iter().enumerate().scan(salt, |before, (position, &token)| {
        *before = digest(*before, token, position, version);
        Some(*before)
    });
    scan.collect()
}

/// What the test knows of a request that was accepted.
struct Accepted {
    prompt: Vec<u32>,
    max_len: usize,
    reuse_prefix: bool,
    draft: bool,
    priority: i32,
    /// Which of [`SALTS`]: what its digests begin with.
    salt: u64,
    /// For each sample, what it has generated and how often it has ended.
    samples: Vec<(Vec<u32>, usize)>,
}

/// What happened in a run; a run in which nothing happens proves nothing.
#[derive(Debug, Default, PartialEq)]
pub struct Seen {
    pub accepted: usize,
    pub overloaded: usize,
    pub cut_prefills: usize,
    pub copies: usize,
    /// Guesses that were drawn, and that were not.
    pub guessed: [usize; 2],
    /// Requests that began before an older one.
    pub overtaken: usize,
    /// Tokens that were computed before the scheduler knew them.
    pub expected: usize,
    /// Steps for which there was room without preemption, and others.
    pub roomy: [usize; 2],
    pub trace: u64,
    pub stats: Stats,
}

pub struct World {
    rng: ChaCha8Rng,
    config: SchedulerConfig,
    scheduler: Scheduler,
    pages: Vec<[u64; BLOCK]>,
    /// The digests that a sequence should see.
    private: BTreeMap<SeqId, Vec<u64>>,
    /// What follows them if the guesses of the step under way are right.
    ahead: BTreeMap<SeqId, Vec<u64>>,
    requests: BTreeMap<RequestId, Accepted>,
    live: BTreeSet<RequestId>,
    /// Requests in the order in which they began.
    begun: Vec<RequestId>,
    version: u64,
    /// Whether requests have priorities and salts.
    ranked: bool,
    /// Whether steps are planned before the tokens of the step before are known.
    eager: bool,
    /// The tokens that the step under way has drawn, and those of the step before that one while they
    /// are expected.
    drawn: Vec<(SeqId, u32)>,
    before: Vec<(SeqId, u32)>,
    pub seen: Seen,
}

impl World {
    pub fn new(seed: u64, config: SchedulerConfig, hash: Option<BlockHash>) -> Self {
        let scheduler = match hash {
            Some(hash) => Scheduler::with_hash(config.clone(), hash),
            None => Scheduler::new(config.clone()),
        };
        Self {
            rng: ChaCha8Rng::seed_from_u64(seed),
            pages: vec![[0; BLOCK]; config.num_blocks],
            scheduler: scheduler.expect("a valid configuration"),
            config,
            private: BTreeMap::new(),
            ahead: BTreeMap::new(),
            requests: BTreeMap::new(),
            live: BTreeSet::new(),
            begun: Vec::new(),
            version: 0,
            ranked: false,
            eager: false,
            drawn: Vec::new(),
            before: Vec::new(),
            seen: Seen::default(),
        }
    }

    /// Gives requests priorities and salts from now on.
    pub fn ranked(self) -> Self {
        Self { ranked: true, ..self }
    }

    /// Plans most steps before the tokens of the step before are known.
    pub fn eager(self) -> Self {
        Self { eager: true, ..self }
    }

    fn chance(&mut self, percent: f64) -> bool {
        self.rng.random_bool(percent / 100.0)
    }

    pub fn round(&mut self) {
        let arrivals = if self.chance(25.0) { self.rng.random_range(1..=3) } else { 0 };
        for _ in 0..arrivals {
            self.add();
        }
        if self.chance(2.0) {
            self.abort_request();
        }
        if self.chance(4.0) {
            self.abort_sample();
        }
        if self.chance(1.5) {
            self.land();
            self.version += 1;
            let recompute = self.chance(50.0);
            self.scheduler.set_version(self.version, recompute);
        }
        self.step();
    }

    /// A prompt made of three phrases of a block's length, the last one cut or spoilt: prompts
    /// often begin alike, and often have the same phrase after different ones.
    fn prompt(&mut self) -> Vec<u32> {
        let len = self.rng.random_range(1..self.config.max_model_len);
        let mut prompt = Vec::new();
        while prompt.len() < len {
            let phrase = self.rng.random_range(0..3);
            prompt.extend((0..BLOCK as u32).map(|t| (t * phrase + phrase) % 5));
        }
        prompt.truncate(len);
        if self.chance(30.0) {
            prompt[len - 1] = self.rng.random_range(0..5);
        }
        prompt
    }

    fn add(&mut self) {
        let id = RequestId(self.requests.len() as u64 + self.seen.overloaded as u64);
        let prompt = self.prompt();
        let len = prompt.len();
        let n = self.rng.random_range(1..=self.config.max_num_seqs.min(6));
        let max_tokens = self.rng.random_range(1..=40);
        let reuse_prefix = !self.chance(10.0);
        let draft = !self.chance(10.0);
        let (priority, salt) = if self.ranked {
            (self.rng.random_range(-1..=1), self.rng.random_range(0..3))
        } else {
            (0, 0)
        };
        let request = NewRequest {
            id,
            prompt: prompt.clone(),
            n,
            max_tokens,
            reuse_prefix,
            draft,
            priority,
            cache_salt: (salt > 0).then(|| SALTS[salt as usize].into()),
        };
        let max_len = (len + max_tokens).min(self.config.max_model_len);
        let fits = (max_len - 1).div_ceil(BLOCK) <= self.config.num_blocks;
        match self.scheduler.add(request) {
            Ok(()) => assert!(fits, "what can never fit is refused"),
            Err(EngineError::Invalid { .. }) => return assert!(!fits, "what fits is accepted"),
            Err(EngineError::Overloaded { waiting }) => {
                assert_eq!(waiting, self.config.max_waiting);
                self.seen.overloaded += 1;
                return;
            }
            Err(error) => panic!("{error}"),
        }
        self.seen.accepted += 1;
        let samples = vec![(Vec::new(), 0); n];
        let accepted = Accepted { prompt, max_len, reuse_prefix, draft, priority, salt, samples };
        self.requests.insert(id, accepted);
        self.live.insert(id);
    }

    fn some_request(&mut self) -> Option<RequestId> {
        let at = self.rng.random_range(0..self.live.len().max(1));
        self.live.iter().nth(at).copied()
    }

    fn abort_request(&mut self) {
        let Some(request) = self.some_request() else { return };
        for id in self.scheduler.samples(request).to_vec() {
            self.note_end(id);
        }
        self.scheduler.abort(request);
        assert!(self.scheduler.samples(request).is_empty());
    }

    fn abort_sample(&mut self) {
        let Some(request) = self.some_request() else { return };
        let index = self.rng.random_range(0..self.requests[&request].samples.len());
        let ended = self.requests[&request].samples[index].1 == 1;
        let seq = self.scheduler.sample(request, index);
        assert_eq!(seq.is_none(), ended, "a sample is there until it ends");
        if let Some(seq) = seq {
            self.end(seq);
        }
    }

    /// Counts the end of a sample that is still there.
    fn note_end(&mut self, seq: SeqId) {
        let sequence = self.scheduler.sequence(seq).expect("ends once");
        let request = self.requests.get_mut(&sequence.group).expect("an accepted request");
        request.samples[sequence.index].1 += 1;
        if request.samples.iter().all(|(_, ends)| *ends == 1) {
            self.live.remove(&sequence.group);
        }
    }

    /// Ends a sample; if the next one inherits its prompt, it inherits the private digests too.
    fn end(&mut self, seq: SeqId) {
        self.note_end(seq);
        let group = self.scheduler.sequence(seq).expect("ends once").group;
        let place = |world: &Self, id| world.scheduler.sequence(id).expect("a live one").place;
        let mut others = self.scheduler.samples(group).iter().filter(|&&id| id != seq);
        let heir = others.next().copied().filter(|&id| place(self, id) == Place::Unforked);
        self.scheduler.finish(seq);
        assert!(self.scheduler.sequence(seq).is_none());
        let digests = self.private.remove(&seq);
        if let (Some(heir), Some(mut digests)) = (heir, digests) {
            // What a step under way computed for the one that ended is computed again.
            digests.truncate(self.scheduler.sequence(heir).expect("a live one").computed);
            self.private.insert(heir, digests);
        }
    }

    fn step(&mut self) {
        if self.chance(10.0) {
            self.land();
        }
        self.before = std::mem::take(&mut self.drawn);
        let roomy = self.scheduler.has_room();
        for (draw, &(seq, _)) in self.before.iter().enumerate() {
            self.scheduler.expect(seq, draw);
        }
        let preempted = self.scheduler.stats().preemptions;
        self.plan_and_run();
        let preempted = self.scheduler.stats().preemptions > preempted;
        assert!(!roomy || !preempted, "there was room");
        self.seen.roomy[usize::from(!roomy)] += 1;
        for (seq, token) in std::mem::take(&mut self.before) {
            self.append(seq, token);
        }
        if !self.eager {
            self.land();
        }
        self.check();
    }

    /// Tells the scheduler the tokens of the step under way.
    fn land(&mut self) {
        for (seq, token) in std::mem::take(&mut self.drawn) {
            self.append(seq, token);
        }
    }

    /// A sequence's tokens, as what computes them knows them.
    fn tokens(&self, seq: SeqId) -> Vec<u32> {
        let sequence = self.scheduler.sequence(seq).expect("a live sequence");
        let mut tokens = sequence.tokens.clone();
        if let Some(draw) = sequence.expected {
            assert_eq!(self.before[draw].0, seq, "one's own token is expected");
            *tokens.last_mut().expect("the expected one") = self.before[draw].1;
        }
        tokens
    }

    fn plan_and_run(&mut self) {
        let is_running = |id: &SeqId| {
            self.scheduler.sequence(*id).is_some_and(|sequence| sequence.place == Place::Running)
        };
        let samples = self.live.iter().flat_map(|request| self.scheduler.samples(*request));
        let before: BTreeSet<SeqId> = samples.copied().filter(is_running).collect();
        let step = self.scheduler.schedule();
        self.check();
        self.check_step(&step);
        if self.before.is_empty() {
            let idle = self.scheduler.is_idle();
            assert_eq!(step.is_empty(), idle, "there is always something to do");
        }
        for chunk in &step.chunks {
            if !before.contains(&chunk.seq) {
                self.check_admission(chunk);
            }
        }
        self.run(&step);
        if self.chance(2.0) {
            self.abort_sample();
        }
        self.scheduler.computed(&step);
        self.check();
        for chunk in step.chunks.iter().filter(|chunk| chunk.sample) {
            self.draw(chunk);
        }
        self.check();
    }

    /// Copies, writes all chunks, then reads back every sequence through its table.
    fn run(&mut self, step: &Step) {
        for &(source, destination) in &step.copies {
            self.pages[destination as usize] = self.pages[source as usize];
        }
        for &Chunk { seq, start, len, drafts, .. } in &step.chunks {
            let tokens = self.tokens(seq);
            let sequence = self.scheduler.sequence(seq).expect("a live sequence");
            let private = self.private.get_mut(&seq).expect("an admitted sequence");
            assert_eq!(private.len(), start);
            let salt = self.requests[&sequence.group].salt;
            let slot = |t: usize| (sequence.blocks[t / BLOCK] as usize, t % BLOCK);
            let mut tokens = tokens[start..].iter().chain(&sequence.drafts).copied();
            for t in start..start + len {
                let token = tokens.next().expect("a token or a guess");
                let before = t.checked_sub(1).map_or((salt, salt), |last| {
                    let (block, offset) = slot(last);
                    (self.pages[block][offset], private[last])
                });
                let (block, offset) = slot(t);
                self.pages[block][offset] = digest(before.0, token, t, self.version);
                private.push(digest(before.1, token, t, self.version));
            }
            self.ahead.insert(seq, private.split_off(private.len() - drafts));
        }
        for &Chunk { seq, .. } in &step.chunks {
            let tokens = self.tokens(seq);
            let sequence = self.scheduler.sequence(seq).expect("a live sequence");
            let private = &self.private[&seq];
            let pages = sequence.blocks.iter().flat_map(|&block| &self.pages[block as usize]);
            assert!(pages.take(private.len()).eq(private), "{seq:?} reads another's KV");
            if let Some(version) = sequence.kv_version {
                let salt = self.requests[&sequence.group].salt;
                assert_eq!(*private, pure(&tokens[..private.len()], version, salt));
            }
        }
    }

    /// Draws a token for each sequence that shares the row of a chunk, and further ones as long as
    /// its guesses are drawn.
    fn draw(&mut self, &Chunk { seq, drafts, .. }: &Chunk) {
        let drawing = self.scheduler.fork(seq);
        let Some(sequence) = self.scheduler.sequence(seq) else {
            return assert!(drawing.is_empty(), "an ended sequence has no row");
        };
        let request = sequence.group;
        if sequence.tokens.len() == sequence.prompt_len {
            assert_eq!(drawing, self.scheduler.samples(request), "all draw from the prompt's row");
        } else {
            assert_eq!(drawing, [seq]);
        }
        let digests = self.private[&seq].clone();
        for id in drawing {
            self.private.insert(id, digests.clone());
            let token = self.rng.random_range(0..2);
            self.drawn.push((id, token));
            if self.eager {
                continue;
            }
            self.land();
            for ahead in 0..drafts {
                let right = self.scheduler.draws(id);
                self.seen.guessed[usize::from(!right)] += 1;
                if !right {
                    break;
                }
                let digest = self.ahead[&id][ahead];
                self.private.get_mut(&id).expect("a live sequence").push(digest);
                let token = self.rng.random_range(0..2);
                self.append(id, token);
            }
        }
    }

    /// Gives a sequence the token that it has drawn, unless it has ended meanwhile.
    fn append(&mut self, id: SeqId, token: u32) {
        let Some(sequence) = self.scheduler.sequence(id) else { return };
        let (request, index) = (sequence.group, sequence.index);
        let accepted = self.requests.get_mut(&request).expect("an accepted request");
        let generated = &mut accepted.samples[index].0;
        generated.push(token);
        let full = accepted.prompt.len() + generated.len() == accepted.max_len;
        assert_eq!(self.scheduler.append(id, token), full);
        if full || self.chance(2.0) {
            self.end(id);
        }
    }

    /// Runs what is left without new requests, and verifies that everything ended once.
    pub fn drain(&mut self) {
        let mut steps = 0;
        while !self.scheduler.is_idle() {
            self.step();
            steps += 1;
            assert!(steps < 100_000, "no end");
        }
        assert!(self.live.is_empty());
        assert_eq!(self.scheduler.blocks_used(), 0);
        assert_eq!(self.scheduler.blocks_free(), self.config.num_blocks);
        assert_eq!((self.scheduler.running(), self.scheduler.waiting()), (0, 0));
        for (id, request) in &self.requests {
            let once = request.samples.iter().all(|(_, ends)| *ends == 1);
            assert!(once, "{id:?} ended other than once");
        }
        self.seen.stats = self.scheduler.stats();
    }
}
