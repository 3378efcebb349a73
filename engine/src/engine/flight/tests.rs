//! A worker step by step: what an engine's owner cannot see from outside.

use super::*;
use crate::{
    device::{Placement, pages::DevicePages},
    engine::{
        OnUpdate, Shared, hold::Status, outlet::tests::Listener, request::LiveRequest,
        runner::Runner, update,
    },
    model::config::ModelConfig,
    scheduler::{DraftLimits, NewRequest, Scheduler, SchedulerConfig},
    torch::random,
    weights::{ServeDtype, Version, Weights},
};
use onpolicy_plugin_api::{Event, PauseMode, Request, RequestId, SamplingParams};
use serde_json::json;
use std::sync::{
    Arc,
    atomic::AtomicUsize,
    mpsc::{self, Receiver, SyncSender, sync_channel},
};
use tch::{Device, Kind};

const VOCAB: u32 = 50;

/// A worker that plans ahead, over random weights.
fn worker(on_update: OnUpdate) -> Worker {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": true,
    });
    let config = ModelConfig::from_hf(&config, None).unwrap();
    random::seed(5);
    let random = |(name, shape): (String, Vec<i64>)| {
        let numbers = random::normal(&[shape.iter().product()]).view(&shape[..]);
        (name, numbers.to_kind(Kind::Double))
    };
    let weights = Weights::new(config.tensor_shapes().into_iter().map(random).collect());
    let limits = SchedulerConfig {
        num_blocks: 20,
        max_num_seqs: 8,
        max_batched_tokens: 64,
        max_model_len: 64,
        max_waiting: 8,
        prefix_cache: true,
        drafts: DraftLimits::default(),
    };
    let placement = Placement { device: Device::Cpu, kind: Kind::Double };
    let pages = DevicePages::new(&config, limits.num_blocks, placement).unwrap();
    let pages = (Some(pages), limits.num_blocks);
    let runner = Runner::new(&config, (&weights, ServeDtype::F32), pages, 0);
    let shared = Shared {
        version: Version::default(),
        status: Status::default(),
        submitted: AtomicUsize::new(0),
        waiting: AtomicUsize::new(0),
    };
    Worker::new(runner, Scheduler::new(limits).unwrap(), Arc::new(shared), (on_update, true))
}

impl Worker {
    /// A sample that ends at its first token, whichever it is.
    fn begin_short(&mut self) -> Receiver<Event> {
        let (events, inbox) = mpsc::channel();
        let params = SamplingParams {
            max_tokens: 30,
            stop_token_ids: (0..VOCAB).collect(),
            ..SamplingParams::default()
        };
        let request = Request::new(vec![1, 2, 3], params);
        let id = RequestId(7);
        self.live.insert(id, LiveRequest::new(&request, &[], Box::new(Listener(events)), None));
        let request = NewRequest {
            id,
            prompt: request.prompt,
            n: 1,
            max_tokens: 30,
            reuse_prefix: true,
            draft: true,
            priority: 0,
            cache_salt: None,
        };
        self.scheduler.add(request).unwrap();
        inbox
    }

    /// Steps until the sample has ended, with a step for it still under way.
    fn end_short(&mut self, inbox: &Receiver<Event>) {
        crate::torch::no_grad(|| self.step());
        assert!(self.flight.is_some() && inbox.try_recv().is_err(), "no token is known");
        crate::torch::no_grad(|| self.step());
        let ended = matches!(inbox.try_iter().last(), Some(Event::Finished { .. }));
        assert!(ended && self.scheduler.is_idle(), "the first token ends it");
        assert!(self.flight.is_some() && self.steps_ahead == 1, "one was planned before");
    }
}

#[test]
fn a_pause_that_waits_is_answered_when_nothing_is_computed() {
    let mut worker = worker(OnUpdate::Keep);
    let inbox = worker.begin_short();
    worker.hold.pause(PauseMode::Wait);
    let (reply, answer) = sync_channel(1);
    worker.hold.wait(false, reply);
    worker.end_short(&inbox);
    worker.answer_pauses();
    assert!(answer.try_recv().is_err(), "a step is under way");
    crate::torch::no_grad(|| worker.step());
    worker.answer_pauses();
    assert_eq!(answer.try_recv(), Ok(Ok(())));
    assert!(worker.flight.is_none() && inbox.try_recv().is_err(), "nothing came after the end");
}

#[test]
fn an_update_that_drains_is_applied_when_nothing_is_computed() {
    let mut worker = worker(OnUpdate::Drain);
    let inbox = worker.begin_short();
    let (reply, answer): (SyncSender<_>, _) = sync_channel(1);
    let change = update::Change::Write(Box::new(|| Ok(())));
    worker.updates.push_back(update::Update { change, version: None, reply });
    worker.end_short(&inbox);
    worker.apply_updates();
    assert!(answer.try_recv().is_err(), "a step is under way");
    crate::torch::no_grad(|| worker.step());
    worker.apply_updates();
    assert_eq!(answer.try_recv(), Ok(Ok(1)));
}

/// A step that fails takes what runs with it; what is computed then is dropped.
#[test]
fn a_panic_with_a_step_under_way_fails_what_runs() {
    let mut worker = worker(OnUpdate::Keep);
    let inbox = worker.begin_short();
    crate::torch::no_grad(|| worker.step());
    worker.guarded(|_| panic!("a bug"));
    let failed = EngineError::Internal("a bug".into());
    assert_eq!(inbox.try_iter().last(), Some(Event::Failed { error: failed }));
    assert!(worker.flight.is_some() && worker.scheduler.is_idle());
    worker.guarded(Worker::step);
    assert!(worker.flight.is_none() && worker.scheduler.check().is_ok());
    // It goes on as before.
    let inbox = worker.begin_short();
    worker.steps_ahead = 0;
    worker.end_short(&inbox);
}
