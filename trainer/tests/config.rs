//! The configuration: defaults, the example file, flags, and what is refused.

use onpolicy_trainer::{
    advantage::Advantage,
    config::{Config, ConfigError, DeviceName, Dtype, Mode, OnUpdate, Schedule, sections},
};
use std::path::Path;

const MINIMAL: &str = "[model]\npath = \"models/SmolLM2-135M-Instruct\"\n";

fn example() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/config.toml");
    std::fs::read_to_string(path).unwrap()
}

fn flags(flags: &[&str]) -> Result<Config, ConfigError> {
    let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
    Config::parse(MINIMAL, &flags)
}

/// What is said about a flag laid over the defaults.
fn refusal(flag: &str) -> String {
    flags(&[flag]).expect_err(flag).to_string()
}

#[test]
fn defaults_are_those_of_the_quick_start() {
    let config = Config::parse(MINIMAL, &[]).unwrap();
    assert_eq!((config.model.device, config.model.dtype), (DeviceName::Cpu, None));
    assert_eq!((config.engine.kv_memory_mb, config.engine.max_num_seqs), (None, 256));
    assert_eq!(config.engine.on_update, OnUpdate::Keep);
    assert_eq!((config.server.host.as_str(), config.server.port), ("127.0.0.1", 8000));
    let names = [&config.task, &config.verifier, &config.gate].map(|p| p.name.as_str());
    assert_eq!(names, ["sum", "last_integer", "clip_b"]);
    assert_eq!((config.rollout.prompts_per_step, config.rollout.group_size), (8, 8));
    assert_eq!((config.rollout.max_new_tokens, config.rollout.temperature), (24, 1.0));
    assert_eq!((config.train.lr, config.train.betas), (2e-5, [0.9, 0.95]));
    assert_eq!((config.train.clip_low, config.train.dual_clip), (0.2, 3.0));
    assert_eq!((config.train.advantage, config.train.mode), (Advantage::Grpo, Mode::Online));
    assert_eq!((config.eval.temperature, config.eval.k), (0.7, vec![1, 4]));
}

#[test]
fn the_example_is_the_defaults_and_mentions_every_key() {
    let text = example();
    let config = Config::parse(&text, &[]).unwrap();
    assert_eq!(config, Config::parse(MINIMAL, &[]).unwrap());
    for section in ["model", "engine", "server", "rollout", "train", "eval", "output"] {
        let body = text.split(&format!("[{section}]\n")).nth(1).unwrap();
        let body = body.split("\n[").next().unwrap();
        for key in keys(section) {
            let line = |l: &str| l.trim_start_matches("# ").starts_with(&format!("{key} = "));
            assert!(body.lines().any(line), "[{section}] {key} is missing");
            let line = body.lines().find(|l| line(l)).unwrap().trim_start_matches("# ");
            assert!(line.contains('#'), "[{section}] {key} has no comment");
        }
    }
}

/// The keys of a section: the refusal of an outlandish one lists them.
fn keys(section: &str) -> Vec<String> {
    let text = refusal(&format!("{section}.zzzzzzzzzzzzzzzz=1"));
    let (_, list) = text.split_once("known are: ").unwrap();
    list.split(", ").map(str::to_owned).collect()
}

#[test]
fn every_key_with_a_default_is_in_the_list_of_keys() {
    let resolved: toml::Table = Config::parse(MINIMAL, &[]).unwrap().to_toml().parse().unwrap();
    for (section, body) in &resolved {
        if !["task", "verifier", "gate"].contains(&section.as_str()) {
            let listed = keys(section);
            let mut keys = body.as_table().unwrap().keys();
            assert!(keys.all(|key| listed.contains(key)), "{section}: {listed:?}");
        }
    }
    assert!(keys("model").contains(&"name".into()), "optional keys are listed too");
}

#[test]
fn the_plug_in_options_of_the_example_are_accepted_by_the_built_ins() {
    use onpolicy_plugin_api::Plugins;
    let plugins = onpolicy_trainer::builtins::register(Plugins::default(), 0);
    let make = |section: &str, name: &str, keys: &[&str]| {
        let text = example();
        let body = text.split(&format!("[{section}]\n")).nth(1).unwrap();
        let body = body.split("\n[").next().unwrap();
        let line = |key: &str| {
            let start = format!("# {key} = ");
            body.lines().find(|l| l.starts_with(&start)).unwrap_or_else(|| panic!("no {key}"))
        };
        let lines: Vec<&str> = keys.iter().map(|key| line(key).trim_start_matches("# ")).collect();
        let text = format!("{MINIMAL}[{section}]\nname = \"{name}\"\n{}", lines.join("\n"));
        let config = Config::parse(&text, &[]).unwrap();
        let refused = match section {
            "task" => plugins.make_task(name, &config.task.options()).err(),
            "verifier" => plugins.make_verifier(name, &config.verifier.options()).err(),
            _ => plugins.make_gate(name, &config.gate.options()).err(),
        };
        assert_eq!(refused, None, "{section} {name}");
    };
    make("task", "sum", &["seed", "system", "prompt", "digits", "terms"]);
    make("task", "countdown", &["numbers", "max_number", "max_target"]);
    make("verifier", "exact", &["ignore_case"]);
    let http = ["timeout_seconds", "deadline_seconds", "retries", "backoff_seconds"];
    make("verifier", "http", &["url", "batch_size", "concurrency", "headers"]);
    make("verifier", "http", &[&http[..], &["url"]].concat());
    make("gate", "clip_b", &["mu", "two_sided"]);
    make("gate", "clip_v", &["max_frac"]);
}

#[test]
fn flags_go_over_the_file() {
    let text =
        format!("{MINIMAL}[train]\nlr = 1e-4\nsteps = 5\n[gate]\nname = \"clip_v\"\nmu = 2\n");
    let over = ["train.lr=3e-5", "gate.max_frac=0.5", "output.dir=runs/a b", "eval.k=[1,2]"];
    let config = Config::parse(&text, &over.map(String::from)).unwrap();
    assert_eq!((config.train.lr, config.train.steps), (3e-5, 5));
    assert_eq!(
        serde_json::Value::Object(config.gate.options),
        serde_json::json!({"mu": 2, "max_frac": 0.5})
    );
    assert_eq!(config.output.dir, "runs/a b");
    assert_eq!(config.eval.k, [1, 2]);
    let config = flags(&["model.path=/models/a", "verifier.headers.X-Key=secret"]).unwrap();
    assert_eq!(config.model.path, "/models/a");
    assert_eq!(config.verifier.options["headers"]["X-Key"], "secret");
    assert_eq!(flags(&["train.lr=1"]).unwrap().train.lr, 1.0, "an integer will do for a number");
}

#[test]
fn a_resolved_configuration_reads_back_the_same() {
    let over = [
        "engine.max_model_len=512",
        "engine.on_update=drain",
        "model.name=policy",
        "train.mode=overlapped",
        "train.schedule=cosine",
        "train.min_lr_ratio=0.1",
        "train.advantage=centered",
        "train.eps=1e-12",
        "verifier.headers={ Accept = \"a\" }",
        "verifier.url=http://h",
        "task.digits=2",
    ];
    let config = flags(&over).unwrap();
    assert_eq!(Config::parse(&config.to_toml(), &[]).unwrap(), config);
    assert_eq!(config.train.schedule, Schedule::Cosine);
    assert_eq!(config.train.mode, Mode::Overlapped);
    assert!(config.to_toml().contains("on_update = \"drain\""));
}

#[test]
fn narrow_types_warn_unless_they_are_corrected_for() {
    let warning = |over: &[&str]| flags(over).unwrap().warning();
    let narrow = warning(&["model.path=m", "model.dtype=bf16"]).expect("a warning");
    assert!(narrow.starts_with("model.dtype = \"bf16\": engine and trainer round"), "{narrow}");
    assert_eq!(warning(&["model.path=m", "model.dtype=f32"]), None);
    assert_eq!(warning(&[]), None);
    assert_eq!(warning(&["train.correction=tis"]), None);
    for dtype in ["f16", "bf16", "int8"] {
        let narrow = format!("engine.serve_dtype={dtype}");
        let text = warning(&[&narrow]).expect("a warning");
        assert!(text.contains(dtype) && text.contains("train.correction = \"tis\""), "{text}");
        assert_eq!(warning(&[&narrow, "train.correction=tis", "train.tis_cap=4"]), None);
    }
    let refused = refusal("engine.serve_dtype=f8");
    assert!(refused.starts_with("engine.serve_dtype: unknown variant `f8`"), "{refused}");
}

#[test]
fn unknown_keys_are_named_with_the_nearest_known() {
    assert_eq!(
        refusal("train.learning=1"),
        "unknown key 'train.learning'; known are: steps, seed, mode, lr, betas, eps, weight_decay, \
         max_grad_norm, schedule, warmup_steps, min_lr_ratio, clip_low, clip_high, dual_clip, \
         correction, tis_cap, advantage, updates_per_batch, micro_batch_tokens, \
         activation_checkpointing"
    );
    assert_eq!(
        refusal("rollout.groupsize=4"),
        "unknown key 'rollout.groupsize'; did you mean 'rollout.group_size'?"
    );
    assert_eq!(refusal("trian.lr=1"), "unknown key 'trian'; did you mean 'train'?");
}

#[test]
fn wrong_types_are_named() {
    let steps = refusal("train.steps=many");
    assert!(steps.starts_with("train.steps: ") && steps.contains("many"), "{steps}");
    let betas = refusal("train.betas=[0.9]");
    assert!(betas.starts_with("train.betas"), "{betas}");
    assert!(
        refusal("train.steps=-1").starts_with("train.steps: "),
        "{}",
        refusal("train.steps=-1")
    );
    let schedule = refusal("train.schedule=linear");
    assert!(schedule.contains("linear") && schedule.contains("cosine"), "{schedule}");
    assert!(refusal("server.port=70000").starts_with("server.port: "));
    let missing = Config::parse("", &[]).unwrap_err().to_string();
    assert!(missing.starts_with("model") && missing.contains("path"), "{missing}");
    assert_eq!(
        Config::parse("train = 5\n[model]\npath = \"a\"", &[]).unwrap_err().to_string(),
        "train: must be a section, [train]; it is of type integer"
    );
    let syntax = Config::parse("[model\n", &[]).unwrap_err().to_string();
    assert!(syntax.starts_with("the configuration is not valid TOML"), "{syntax}");
    let twice = Config::parse("[model]\npath = \"a\"\npath = \"b\"", &[]).unwrap_err();
    assert!(matches!(twice, ConfigError::Syntax(_)));
}

#[test]
fn devices_and_types_are_named() {
    let cuda = flags(&["model.device=cuda", "model.dtype=bf16"]).unwrap();
    assert_eq!((cuda.model.device, cuda.model.dtype), (DeviceName::Cuda, Some(Dtype::Bf16)));
    assert_eq!(Config::parse(&cuda.to_toml(), &[]).unwrap(), cuda);
    let device = refusal("model.device=tpu");
    assert!(device.starts_with("model.device") && device.contains("`cuda`"), "{device}");
    let dtype = refusal("model.dtype=int8");
    assert!(dtype.starts_with("model.dtype") && dtype.contains("`bf16`"), "{dtype}");
    for other in ["model.device=cuda", "model.device=auto", "model.dtype=bf16"] {
        let error = flags(&["engine.serve_dtype=f16", other]).unwrap_err().to_string();
        assert!(error.starts_with("engine.serve_dtype = \"f16\""), "{error}");
    }
    assert!(flags(&["engine.serve_dtype=f16", "model.dtype=f32"]).is_ok());
    assert!(refusal("model.kernels=false").contains("about a CUDA device"));
    assert!(!flags(&["model.kernels=false", "model.device=auto"]).unwrap().model.kernels);
}

#[test]
fn ranges_are_named() {
    let cases = [
        ("model.path=\" \"", "model.path = \" \": must not be empty"),
        ("engine.kv_memory_mb=0", "engine.kv_memory_mb = 0: must be between 1 and 1048576"),
        ("server.max_connections=0", "server.max_connections = 0: must be between 1 and 1048576"),
        ("server.max_body_mb=2000", "server.max_body_mb = 2000: must be between 1 and 1024"),
        (
            "server.body_timeout_seconds=0",
            "server.body_timeout_seconds = 0: must be between 1 and 604800",
        ),
        ("engine.max_model_len=1", "engine.max_model_len = 1: must be between 2 and 16777216"),
        (
            "engine.max_model_len=24",
            "rollout.max_new_tokens = 24: must be below engine.max_model_len (24)",
        ),
        ("rollout.group_size=1", "rollout.group_size = 1: must be between 2 and 4096"),
        (
            "rollout.group_size=300",
            "rollout.group_size = 300: must not be more than engine.max_num_seqs (256)",
        ),
        ("rollout.temperature=0", "rollout.temperature = 0: must be above 0 and at most 100"),
        ("train.lr=nan", "train.lr = NaN: must be above 0 and at most 1"),
        ("train.betas=[0.9,1.0]", "train.betas[1] = 1: must be at least 0, below 1"),
        ("train.warmup_steps=21", "train.warmup_steps = 21: must be between 0 and 20"),
        (
            "train.min_lr_ratio=0.1",
            "train.min_lr_ratio = 0.1: has no effect unless train.schedule is \"cosine\"",
        ),
        ("train.clip_low=1.0", "train.clip_low = 1: must be above 0, below 1"),
        ("train.dual_clip=1", "train.dual_clip = 1: must be above 1 and at most 1000"),
        ("train.tis_cap=0.5", "train.tis_cap = 0.5: must be between 1 and 1000"),
        ("train.tis_cap=3", "train.tis_cap = 3: has no effect unless train.correction is \"tis\""),
        (
            "train.updates_per_batch=9",
            "train.updates_per_batch = 9: must not be more than rollout.prompts_per_step (8)",
        ),
        ("eval.k=[5]", "eval.k = 5: must be between 1 and eval.samples (4)"),
        ("eval.k=[1,1]", "eval.k = [1, 1]: names a k twice"),
        ("eval.k=[]", "eval.k = []: must name at least one k"),
        ("gate.name=\"\"", "gate.name = \"\": must not be empty"),
        ("gate.mu=inf", "gate.mu = inf or nan: must be a finite number"),
        ("output.keep_checkpoints=0", "output.keep_checkpoints = 0: must be between 1 and 1048576"),
    ];
    for (flag, expected) in cases {
        assert_eq!(refusal(flag), expected);
    }
}

#[test]
fn flags_must_be_assignments() {
    for flag in ["train.lr", "lr=1", "=1", "train.=1", ".lr=1"] {
        assert!(refusal(flag).starts_with(&format!("'{flag}': ")), "{}", refusal(flag));
    }
    assert_eq!(refusal("model.path.x=1"), "'model.path.x=1': 'path' is not a section");
}

#[test]
fn a_file_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.toml");
    std::fs::write(&path, MINIMAL).unwrap();
    let config = Config::load(Some(&path), &["train.seed=7".into()]).unwrap();
    assert_eq!(config.train.seed, 7);
    let missing = Config::load(Some(Path::new("/nowhere/a.toml")), &[]).unwrap_err().to_string();
    assert!(missing.starts_with("cannot read the configuration /nowhere/a.toml"), "{missing}");
    assert!(Config::load(None, &["model.path=a".into()]).is_ok());
}

#[test]
fn naming_another_plugin_starts_from_its_defaults() {
    let text = "[model]\npath = 'm'\n[gate]\nname = 'clip_v'\nmu = 7.5\nmax_frac = 0.1";
    let options = |flags: &[&str]| {
        let flags: Vec<String> = flags.iter().map(ToString::to_string).collect();
        let gate = Config::parse(text, &flags).unwrap().gate;
        (gate.name, serde_json::Value::Object(gate.options).to_string())
    };
    assert_eq!(options(&["gate.name=none"]), ("none".into(), "{}".into()));
    let same = options(&["gate.name=clip_v", "gate.mu=8"]);
    assert_eq!(same, ("clip_v".into(), r#"{"max_frac":0.1,"mu":8}"#.into()));
    let other = options(&["gate.name=clip_b", "gate.mu=2"]);
    assert_eq!(other, ("clip_b".into(), r#"{"mu":2}"#.into()));
}

#[test]
fn keys_are_read_and_never_written() {
    let set = ["server.api_key=data-secret", "server.control_key=\"control-secret\""];
    let config = flags(&[&set[..], &["model.path=m", "server.control=on"]].concat()).unwrap();
    let key = |text: &str| Some(sections::Key::new(text).unwrap());
    assert_eq!(config.server.api_key, key("data-secret"));
    assert_eq!(config.server.control_key, key("control-secret"));
    for text in [config.to_toml(), format!("{config:?}")] {
        assert!(!text.contains("secret"), "{text}");
    }
    let read = Config::parse(&config.to_toml(), &[]).unwrap();
    assert_eq!((read.server.api_key, read.server.control_key), (None, None));
    assert_eq!(read.server.control, sections::ControlPlane::On);
    for (flag, word) in [
        ("server.api_key=\"\"", "visible ASCII"),
        ("server.control_key=\"a b\"", "visible ASCII"),
        ("server.control=sometimes", "auto"),
        ("server.weight_roots=[\" \"]", "must not be empty"),
        ("server.tool_format=xml", "hermes"),
        ("server.control_timeout_seconds=0", "must be between 1 and 86400"),
    ] {
        let refused = refusal(flag);
        assert!(refused.starts_with("server") && refused.contains(word), "{refused}");
    }
}
