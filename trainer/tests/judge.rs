//! The judge, over engines that do what they are told.

use onpolicy_engine::{chat::ChatTokenizer, model::loading::load};
use onpolicy_plugin_api::{
    Attempt, Engine, EngineError, Event, FinishReason, Message, ModelInfo, Options, Plugins,
    Problem, Request, RequestId, Role, Score, Sink, Token, TokenStats, Verifier,
};
use onpolicy_trainer::{
    builtins,
    verifiers::judge::{Judge, JudgeOptions},
};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny/llama-tied")
}

fn tokenizer() -> ChatTokenizer {
    load(tiny().to_str().expect("UTF-8")).expect("the checkpoint loads").tokenizer
}

/// What the engine does with a prompt.
enum Does {
    Says(&'static str),
    Fails,
    Hangs,
    Refuses,
}

struct Scripted {
    tokenizer: ChatTokenizer,
    does: fn(&str) -> Does,
    /// Prompts as text.
    asked: Mutex<Vec<String>>,
    /// Sinks that wait for ever.
    hanging: Mutex<Vec<Box<dyn Sink>>>,
    next: AtomicU64,
}

impl Engine for Scripted {
    fn info(&self) -> ModelInfo {
        ModelInfo {
            name: "judge".into(),
            max_model_len: 256,
            vocab_size: 160,
            eos_token_ids: vec![2],
            max_samples: 1,
        }
    }

    fn submit(&self, request: Request, mut sink: Box<dyn Sink>) -> Result<RequestId, EngineError> {
        let prompt = self.tokenizer.decode(&request.prompt, true).expect("text");
        self.asked.lock().unwrap().push(prompt.clone());
        match (self.does)(&prompt) {
            Does::Says(text) => {
                for id in self.tokenizer.encode(text).expect("known words") {
                    let stats = TokenStats::default();
                    let token = Token { id, stats, weight_version: 0, top: Vec::new() };
                    sink.send(Event::Token { index: 0, token });
                }
                sink.send(Event::Finished { index: 0, reason: FinishReason::Stop });
            }
            Does::Fails => {
                let error = EngineError::Internal("out of luck".into());
                sink.send(Event::Failed { error });
            }
            Does::Hangs => self.hanging.lock().unwrap().push(sink),
            Does::Refuses => return Err(EngineError::invalid("prompt", "is too long")),
        }
        Ok(RequestId(self.next.fetch_add(1, SeqCst)))
    }

    fn abort(&self, _: RequestId, _: Option<usize>) {}

    fn weight_version(&self) -> u64 {
        0
    }
}

fn judge(does: fn(&str) -> Does, mut options: Value) -> (Judge, Arc<Scripted>) {
    options["model"] = "unused".into();
    if options["template"].is_null() {
        options["template"] = "{{ question }} {{ completion }} {{ answer }}".into();
    }
    let options: JudgeOptions = serde_json::from_value(options).expect("options");
    let engine = Arc::new(Scripted {
        tokenizer: tokenizer(),
        does,
        asked: Mutex::default(),
        hanging: Mutex::default(),
        next: AtomicU64::new(0),
    });
    let judge = Judge::over((engine.clone(), tokenizer()), options).expect("a judge");
    (judge, engine)
}

fn verdicts(judge: &Judge, completions: &[&str]) -> Vec<Score> {
    let system = Message { role: Role::System, content: "t99".into() };
    let messages = vec![system, Message::user("t10 t11")];
    let problem = Problem { messages, answer: "t12".into() };
    let attempt = |completion| Attempt { problem: &problem, completion, truncated: false };
    let attempts: Vec<Attempt<'_>> = completions.iter().map(|text| attempt(text)).collect();
    judge.verify(&attempts)
}

fn reason(score: &Score) -> &str {
    match score {
        Score::Failed(error) => &error.0,
        Score::Reward(reward) => panic!("judged: {reward}"),
    }
}

/// Grades by the completion, which stands before the reference answer.
fn grader(prompt: &str) -> Does {
    match prompt {
        p if p.contains("t21") => Does::Says("t5 t30"),
        p if p.contains("t22") => Does::Says("t5 t40 t7"),
        p if p.contains("t23") => Does::Says("t6 t30"),
        p if p.contains("t24") => Does::Fails,
        p if p.contains("t25") => Does::Refuses,
        _ => Does::Hangs,
    }
}

#[test]
fn grades_are_found_and_scaled() {
    let (judge, engine) = judge(grader, json!({"grade": r"t5 t(\d+)", "scale": 0.1}));
    assert_eq!(verdicts(&judge, &["t21", "t22"]), [Score::Reward(3.0), Score::Reward(4.0)]);
    let asked = engine.asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 2);
    // The judge sees question, completion and answer, and not the policy's system message.
    assert!(asked[0].contains("t10 t11 t21 t12") && !asked[0].contains("t99"), "{asked:?}");
    assert!(verdicts(&judge, &[]).is_empty());
}

#[test]
fn grades_may_be_words() {
    let scale = json!({"t30": 1.0, "t40": -0.5});
    let (judge, _) = judge(grader, json!({"grade": r"t[56] (t\d+)", "scale": scale}));
    let scores = verdicts(&judge, &["t21", "t22"]);
    assert_eq!(scores, [Score::Reward(1.0), Score::Reward(-0.5)]);
    let (judge, _) = self::judge(grader, json!({"grade": r"t\d+ (t\d+)", "scale": {"t40": 1.0}}));
    assert!(reason(&verdicts(&judge, &["t21"])[0]).contains("'t30' is not in verifier.scale"));
    let (judge, _) = self::judge(grader, json!({"grade": r"t\d+ (t\d+)"}));
    assert!(reason(&verdicts(&judge, &["t21"])[0]).contains("is no number"));
}

#[test]
fn what_goes_wrong_with_one_costs_that_one() {
    let options = json!({"grade": r"t5 t(\d+)", "deadline_seconds": 0.3, "batch_size": 2});
    let (judge, engine) = judge(grader, options);
    let started = Instant::now();
    let scores = verdicts(&judge, &["t24", "t21", "t25", "t23", "t26", "t22"]);
    assert_eq!((&scores[1], &scores[5]), (&Score::Reward(30.0), &Score::Reward(40.0)));
    assert!(reason(&scores[0]).contains("out of luck"));
    assert!(reason(&scores[2]).contains("too long"));
    assert!(reason(&scores[3]).contains("there is no grade in 't6 t30'"));
    assert!(reason(&scores[4]).contains("in time"));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(engine.asked.lock().unwrap().len(), 6);
}

#[test]
fn options_are_checked() {
    let refusal = |options: Value| {
        let plugins = builtins::register(Plugins::default(), 0);
        let options = Options(options.as_object().expect("a table").clone());
        plugins.make_verifier("judge", &options).err().expect("it is refused").to_string()
    };
    let with = |key: &str, value: Value| {
        let mut options = json!({"model": tiny().display().to_string()});
        options[key] = value;
        refusal(options)
    };
    assert!(refusal(json!({})).contains("missing field `model`"));
    assert!(with("grades", json!("x")).contains("unknown field `grades`"));
    assert!(with("grade", json!("(")).contains("grade: "));
    assert!(with("grade", json!("x")).contains("has no group"));
    assert!(with("template", json!("{{ question")).contains("template: "));
    assert!(with("template", json!("{{ quesiton }}")).contains("undefined"));
    assert!(with("deadline_seconds", json!(0)).contains("deadline_seconds = 0"));
    assert!(with("engine", json!("nothing")).contains("no such engine"));
    assert!(with("engine", json!("http://127.0.0.1:9")).contains("no server answers"));
    assert!(with("model", json!("/no/such/model")).contains("no such"));
}

#[test]
fn a_model_of_our_own_judges() {
    let plugins = builtins::register(Plugins::default(), 0);
    let options = json!({
        "model": tiny().display().to_string(), "kv_memory_mb": 8, "max_tokens": 4,
        "template": "{{ completion }}", "grade": r"t(\d+)", "scale": 0.01,
    });
    let options = Options(options.as_object().expect("a table").clone());
    let judge = plugins.make_verifier("judge", &options).expect("a judge");
    let problem = Problem { messages: vec![Message::user("t5")], answer: String::new() };
    let attempt = |completion| Attempt { problem: &problem, completion, truncated: false };
    let scores = judge.verify(&[attempt("t7 t8"), attempt("t90"), attempt("t7 t8")]);
    assert_eq!(scores[0], scores[2], "it is greedy");
    for score in &scores {
        assert!(
            matches!(score, Score::Reward(reward) if (0.03..1.6).contains(reward)),
            "{scores:?}"
        );
    }
}
