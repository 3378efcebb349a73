//! Two sets of weights: versions of an even number are served with one, odd ones with the other.
//! For each there is an engine that is left alone, the oracle of what it answers.

use onpolicy_engine::{
    collect::collect,
    engine::{EngineConfig, EngineHandle, Model, OnUpdate},
    model::loading::{Checkpoint, load},
    torch::random,
    weights::Weights,
};
use onpolicy_plugin_api::{Engine, Request, SamplingParams};
use std::{
    collections::HashMap,
    path::Path,
    time::{Duration, Instant},
};
use tch::Tensor;

/// Longest sequence of the oracle's own.
const AHEAD: usize = 96;

/// A served model whose weights change between two sets.
pub struct Policy {
    pub checkpoint: Checkpoint,
    pub engine: EngineHandle,
    served: Vec<Tensor>,
    sets: [Vec<Tensor>; 2],
}

/// Changes the weights.
pub struct Owner {
    pub engine: EngineHandle,
    served: Vec<Tensor>,
    sets: [Vec<Tensor>; 2],
}

fn handles(tensors: &[Tensor]) -> Vec<Tensor> {
    tensors.iter().map(Tensor::shallow_clone).collect()
}

impl Owner {
    /// Serves the other set, as the next version.
    pub fn update(&self) {
        let next = (self.engine.weight_version() + 1) % 2;
        let (mut served, set) = (handles(&self.served), handles(&self.sets[next as usize]));
        let write = move || {
            onpolicy_engine::torch::no_grad(|| {
                served.iter_mut().zip(&set).for_each(|(to, from)| to.copy_(from))
            });
            Ok(())
        };
        let ((), version) = self.engine.update(write).expect("the update is applied");
        assert_eq!(version % 2, next, "only this test changes the weights");
    }
}

impl Policy {
    /// Loads a tiny checkpoint; the pool is too small for all that the test asks for at once, so
    /// that samples are preempted too.
    pub fn load() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny/llama-tied");
        let checkpoint = load(path.to_str().expect("UTF-8")).expect("a golden checkpoint");
        random::seed(1);
        let even: Vec<Tensor> = checkpoint.tensors.iter().map(|(_, t)| t.copy()).collect();
        let odd = even.iter().map(|t| t + random::normal(&t.size()) * 0.05).collect();
        let served: Vec<Tensor> = even.iter().map(Tensor::copy).collect();
        let config = EngineConfig {
            kv_memory: 1 << 20,
            max_num_seqs: 64,
            max_waiting: 24,
            on_update: OnUpdate::Recompute,
            ..EngineConfig::default()
        };
        let engine = start(&checkpoint, &served, config);
        Self { checkpoint, engine, served, sets: [even, odd] }
    }

    /// What changes its weights, for another thread.
    pub fn owner(&self) -> Owner {
        let sets = [handles(&self.sets[0]), handles(&self.sets[1])];
        Owner { engine: self.engine.clone(), served: handles(&self.served), sets }
    }

    /// Engines that are left alone, one for each set.
    pub fn oracle(&self) -> Oracle {
        let config = EngineConfig { kv_memory: 4 << 20, ..EngineConfig::default() };
        let engines = [0, 1].map(|set: usize| start(&self.checkpoint, &self.sets[set], config));
        Oracle { engines, known: HashMap::new() }
    }
}

fn start(checkpoint: &Checkpoint, tensors: &[Tensor], config: EngineConfig) -> EngineHandle {
    let names = checkpoint.tensors.iter().map(|(name, _)| name.clone());
    let weights = Weights::new(names.zip(tensors.iter().map(Tensor::shallow_clone)).collect());
    let shape = checkpoint.config.clone();
    let model = Model { name: "tiny".into(), config: shape, weights, tokenizer: None };
    EngineHandle::start(model, config).expect("the engine starts")
}

/// Knows what each set of weights answers alone.
pub struct Oracle {
    engines: [EngineHandle; 2],
    known: HashMap<(u64, Vec<u32>), Vec<u32>>,
}

impl Oracle {
    /// Checks a greedy sample: the tokens of each weight version are those with which its weights
    /// go on after all tokens before them. (At an update the KV of a running sample is computed
    /// again, so that what came before counts as a prompt.)
    pub fn check(&mut self, prompt: &[u32], tokens: &[u32], versions: &[u64]) {
        assert_eq!(tokens.len(), versions.len());
        assert!(versions.is_sorted(), "{versions:?}");
        let mut start = 0;
        for stretch in versions.chunk_by(|a, b| a == b) {
            let before = [prompt, &tokens[..start]].concat();
            let end = start + stretch.len();
            let alone = self.goes_on(stretch[0] % 2, before);
            let (got, want) = (&tokens[start..end], &alone[..stretch.len()]);
            assert_eq!(got, want, "version {} after {start} tokens", stretch[0]);
            start = end;
        }
    }

    fn goes_on(&mut self, set: u64, tokens: Vec<u32>) -> &[u32] {
        let engine = &self.engines[set as usize];
        self.known.entry((set, tokens.clone())).or_insert_with(|| {
            let params = SamplingParams {
                temperature: 0.0,
                max_tokens: AHEAD,
                ignore_eos: true,
                ..SamplingParams::default()
            };
            let deadline = Instant::now() + Duration::from_secs(60);
            let groups = collect(engine, vec![Request::new(tokens, params)], deadline, &mut || {});
            let groups = groups.expect("the oracle answers");
            groups[0].samples[0].tokens.iter().map(|token| token.id).collect()
        })
    }
}
