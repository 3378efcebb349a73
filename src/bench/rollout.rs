//! `onpolicy bench rollout`: new tokens a second, in process, over HTTP, and of other servers.

use super::{
    cli::{Common, positive},
    client::{Asks, Server},
    compare::Compare,
    phases::{self, Timed},
    report::{Line, Report, Unit},
    session::{Round, Session, peak_memory},
    workload::{Prompt, Workload},
};
use crate::server;
use anyhow::ensure;
use clap::Args;
use onpolicy_engine::{
    collect::collect, engine::EngineHandle, http::metrics::PrometheusHandle,
    model::config::ModelConfig, profile::Profile, sampler::stream_of,
};
use onpolicy_plugin_api::{Engine, Request, SamplingParams};
use std::time::Instant;

/// `onpolicy bench rollout`.
#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Workloads: W1 (1 prompt x 1 sample of 128 new tokens), W2 (8 x 8), W3 (32 x 8), W4 (4 x 16
    /// of 64 with prompts of 987 tokens), smoke (2 x 2 of 8)
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = Workload::named, default_value = "W2")]
    workload: Vec<Workload>,
    /// Prompts of a workload of any other size
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "workload")]
    prompts: Option<usize>,
    /// Samples of each prompt
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "workload")]
    samples: Option<usize>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "workload")]
    prompt_tokens: Option<usize>,
    /// New tokens of each sample
    #[arg(long, value_name = "N", value_parser = positive, conflicts_with = "workload")]
    new_tokens: Option<usize>,
    /// Also measure the same number of samples with a prompt of its own for each
    #[arg(long)]
    no_sharing: bool,
    /// Also show where the time goes, by phase of the engine's steps (engine.profile)
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    compare: Compare,
}

/// Runs the benchmark.
///
/// # Errors
/// A model or configuration that does not work, or a server that answers otherwise than asked.
pub fn run(arguments: &Arguments) -> Result<(), anyhow::Error> {
    let report = measure(arguments)?;
    arguments.common.publish(&report)
}

fn measure(arguments: &Arguments) -> Result<Report, anyhow::Error> {
    let others = arguments.compare.connect()?;
    let metrics = server::record_metrics()?;
    let workloads = arguments.workloads();
    let mut session = Session::start(&arguments.common, |checkpoint| {
        let mut keys = memory(&workloads, !arguments.no_sharing, &checkpoint.config)?;
        keys.push(format!("engine.profile={}", arguments.profile));
        Ok(keys)
    })?;
    let http = serve(&session, metrics)?;
    let mut contestants = arguments.contestants(&session, &http.url())?;
    contestants.extend(others.into_iter().map(Contestant::Other));
    let mut runs: Vec<Vec<Runs>> =
        workloads.iter().map(|_| contestants.iter().map(|_| Runs::default()).collect()).collect();
    for (turn, round) in session.rounds().enumerate() {
        for (workload, runs) in workloads.iter().zip(&mut runs) {
            let prompts = Prompts::new(workload, &session, round)?;
            for place in 0..contestants.len() {
                // Whoever goes first in one run goes last in the next.
                let who = (turn + place) % contestants.len();
                runs[who].add(&contestants[who], &prompts, round.counts)?;
            }
        }
    }
    let memory = peak_memory("process");
    let guesses = guesses(&session.engine)?;
    http.stop();
    let rates = session.rates();
    let (mut lines, mut phases, mut notes) = (Vec::new(), Vec::new(), Vec::new());
    for (workload, runs) in workloads.iter().zip(&runs) {
        let group = workload.describe();
        let unit = Unit::PerSecond(workload.all_new_tokens() as f64, "tokens");
        let line = |(contestant, runs): (&Contestant, &Runs)| {
            let need = rates.need(&session.costs.rollout(workload, contestant.shares()));
            Line::times(&group, contestant.name(), unit, &runs.seconds, Some(need))
        };
        let of_workload: Vec<Line> = contestants.iter().zip(runs).map(line).collect();
        notes.extend(ratios(workload, &contestants, &of_workload));
        lines.extend(of_workload);
        for (contestant, runs) in contestants.iter().zip(runs) {
            let group = format!("{group}: where the time goes {}", contestant.name());
            phases.extend(phases::lines(&group, &runs.timed));
            notes.extend(runs.counts_otherwise(contestant.name()));
        }
    }
    lines.extend(phases.into_iter().chain(memory));
    notes.extend(guesses);
    Ok(session.report("rollout", lines, notes))
}

/// What one contestant did on one workload.
#[derive(Default)]
struct Runs {
    seconds: Vec<f64>,
    timed: Vec<Timed>,
    counts: Counts,
}

impl Runs {
    /// Lets the contestant run once more.
    fn add(
        &mut self,
        contestant: &Contestant,
        prompts: &Prompts<'_>,
        counts: bool,
    ) -> Result<(), anyhow::Error> {
        contestant.forget()?;
        let before = contestant.profile()?;
        let (seconds, prompt_tokens) = contestant.rollout(prompts)?;
        self.counts = self.counts.or(prompt_tokens);
        if counts {
            self.seconds.push(seconds);
            let both = before.zip(contestant.profile()?);
            let timed =
                both.map(|(before, after)| Timed { profile: after.since(&before), seconds });
            self.timed.extend(timed);
        }
        Ok(())
    }

    /// Says so if a server counts other prompt tokens than we do.
    fn counts_otherwise(&self, name: &str) -> Option<String> {
        let (theirs, ours) = self.counts.filter(|(theirs, ours)| theirs != ours)?;
        Some(format!("{name} counts {theirs} prompt tokens where we count {ours}"))
    }
}

impl Arguments {
    fn workloads(&self) -> Vec<Workload> {
        let sizes = [self.prompts, self.samples, self.prompt_tokens, self.new_tokens];
        if sizes.iter().all(Option::is_none) {
            return self.workload.clone();
        }
        let default = [8, 8, 41, 128];
        let size = |index: usize| sizes[index].unwrap_or(default[index]);
        vec![Workload::custom([size(0), size(1), size(2), size(3)])]
    }

    /// The ways to ask our own engine.
    fn contestants(&self, session: &Session, url: &str) -> Result<Vec<Contestant>, anyhow::Error> {
        let engine = || session.engine.clone();
        let connect = |name: &str, asks: Asks| {
            let server = Server::connect(name, url, asks, self.compare.timeout())?;
            Ok::<_, anyhow::Error>(Contestant::Http(server, engine()))
        };
        let mut all = vec![Contestant::InProcess(engine())];
        if let Some(logprobs) = self.compare.logprobs() {
            let asks = Asks { logprobs: Some(logprobs), token_ids: true, ..Asks::default() };
            all.push(connect(WITH_LOGPROBS, asks)?);
        }
        all.push(connect(TEXT_ONLY, Asks::default())?);
        if self.no_sharing {
            all.push(Contestant::Unshared(engine()));
        }
        Ok(all)
    }
}

const IN_PROCESS: &str = "in process";
const UNSHARED: &str = "in process, no sharing";
const WITH_LOGPROBS: &str = "HTTP, tokens and log-probs";
const TEXT_ONLY: &str = "HTTP, text only";

/// Checks that the model can do the workloads; the configuration that has room for them.
fn memory(
    workloads: &[Workload],
    sharing: bool,
    model: &ModelConfig,
) -> Result<Vec<String>, anyhow::Error> {
    workloads.iter().try_for_each(|workload| workload.check(model))?;
    let most = |of: &dyn Fn(&Workload) -> usize| workloads.iter().map(of).max().unwrap_or(0);
    let bytes = most(&|workload| match sharing {
        true => workload.kv_bytes(model),
        false => workload.unshared().kv_bytes(model),
    });
    let samples = most(&Workload::all_samples);
    Ok(vec![
        format!("engine.kv_memory_mb={}", (bytes >> 20) + 1),
        format!("engine.max_num_seqs={}", samples.max(256)),
        format!("engine.max_waiting={}", samples.max(1024)),
    ])
}

fn serve(session: &Session, metrics: PrometheusHandle) -> Result<server::Server, anyhow::Error> {
    let mut config = session.config.clone();
    config.server.enabled = true;
    let served = (&session.served.engine, &session.served.tokenizer);
    let server = server::start(&config, served, metrics, None)?;
    server.ok_or_else(|| anyhow::anyhow!("the server did not start"))
}

/// What all contestants are asked in one run.
struct Prompts<'a> {
    workload: &'a Workload,
    shared: Vec<Prompt>,
    /// One prompt for each sample.
    unshared: Vec<Prompt>,
    seed: u64,
}

impl<'a> Prompts<'a> {
    fn new(workload: &'a Workload, session: &Session, round: Round) -> Result<Self, anyhow::Error> {
        let tokenizer = &session.served.tokenizer;
        let [of_shared, of_unshared, seed] = [0, 1, 2].map(|part| stream_of(round.seed, part));
        Ok(Self {
            workload,
            shared: workload.prompts(tokenizer, of_shared)?,
            unshared: workload.unshared().prompts(tokenizer, of_unshared)?,
            seed,
        })
    }
}

/// Whoever makes the samples.
enum Contestant {
    /// Our engine, called.
    InProcess(EngineHandle),
    /// Our engine, called, with a prompt for each sample.
    Unshared(EngineHandle),
    /// Our engine, over HTTP.
    Http(Server, EngineHandle),
    /// Another server.
    Other(Server),
}

/// Prompt tokens by a server's count, and by ours.
type Counts = Option<(u64, u64)>;

impl Contestant {
    fn name(&self) -> &str {
        match self {
            Self::InProcess(_) => IN_PROCESS,
            Self::Unshared(_) => UNSHARED,
            Self::Http(server, _) | Self::Other(server) => &server.name,
        }
    }

    /// What our engine has done so far, if it keeps a profile.
    fn profile(&self) -> Result<Option<Profile>, anyhow::Error> {
        match self {
            Self::InProcess(engine) | Self::Unshared(engine) | Self::Http(_, engine) => {
                Ok(engine.profile()?)
            }
            Self::Other(_) => Ok(None),
        }
    }

    fn shares(&self) -> bool {
        !matches!(self, Self::Unshared(_))
    }

    /// Our engine has answered the same prompts just now, perhaps with the same seeds: it forgets
    /// them, and what it would guess from them.
    fn forget(&self) -> Result<(), anyhow::Error> {
        match self {
            Self::InProcess(engine) | Self::Unshared(engine) | Self::Http(_, engine) => {
                Ok(engine.reset_prefix_cache()?)
            }
            Self::Other(_) => Ok(()),
        }
    }

    /// Seconds of one rollout.
    fn rollout(&self, prompts: &Prompts<'_>) -> Result<(f64, Counts), anyhow::Error> {
        let Prompts { workload, shared, unshared, seed } = prompts;
        match self {
            Self::InProcess(engine) => Ok((in_process(engine, workload, shared, *seed)?, None)),
            Self::Unshared(engine) => {
                Ok((in_process(engine, &workload.unshared(), unshared, *seed)?, None))
            }
            Self::Http(server, _) => Ok((server.rollout(workload, shared, *seed)?.seconds, None)),
            Self::Other(server) => {
                let rollout = server.rollout(workload, shared, *seed)?;
                let ours = shared.iter().map(|prompt| prompt.ids.len() as u64).sum();
                Ok((rollout.seconds, rollout.prompt_tokens.map(|theirs| (theirs, ours))))
            }
        }
    }
}

/// Seconds of one rollout without HTTP, by an engine that has forgotten earlier ones.
pub(super) fn in_process(
    engine: &EngineHandle,
    workload: &Workload,
    prompts: &[Prompt],
    seed: u64,
) -> Result<f64, anyhow::Error> {
    let request = |(index, prompt): (usize, &Prompt)| {
        let params = SamplingParams {
            n: workload.samples,
            max_tokens: workload.new_tokens,
            ignore_eos: true,
            seed: Some(stream_of(seed, index)),
            ..SamplingParams::default()
        };
        Request::new(prompt.ids.clone(), params)
    };
    let requests = prompts.iter().enumerate().map(request).collect();
    let started = Instant::now();
    let deadline = started + std::time::Duration::from_secs(3600);
    let groups = collect(engine, requests, deadline, &mut || {})?;
    let seconds = started.elapsed().as_secs_f64();
    let samples = groups.iter().flat_map(|group| &group.samples);
    let lengths: Vec<usize> = samples.map(|sample| sample.tokens.len()).collect();
    ensure!(
        lengths == vec![workload.new_tokens; workload.all_samples()],
        "the engine made samples of {lengths:?} tokens where {} of {} were asked for",
        workload.all_samples(),
        workload.new_tokens
    );
    Ok(seconds)
}

/// What became of our engine's guesses, in all runs.
fn guesses(engine: &EngineHandle) -> Result<Option<String>, anyhow::Error> {
    let stats = engine.stats()?;
    let share = stats.accepted as f64 / stats.drafted as f64;
    Ok((stats.drafted > 0).then(|| {
        format!(
            "of {} tokens that our engine guessed in steps with rows to spare, {:.0} % were drawn",
            stats.drafted,
            100.0 * share
        )
    }))
}

/// How the contestants' medians stand to each other.
fn ratios(workload: &Workload, contestants: &[Contestant], lines: &[Line]) -> Vec<String> {
    let median = |name: &str| Some(lines.iter().find(|line| line.name == name)?.median);
    let says = |fast: &str, slow: &str| {
        let times = median(fast)? / median(slow)?;
        Some(format!("{}: {fast} = {times:.2} x {slow}", workload.name))
    };
    let ours = if median(WITH_LOGPROBS).is_some() { WITH_LOGPROBS } else { TEXT_ONLY };
    let among_ours = [
        says(IN_PROCESS, WITH_LOGPROBS),
        says(TEXT_ONLY, WITH_LOGPROBS),
        says(IN_PROCESS, UNSHARED),
    ];
    let others = contestants.iter().filter(|who| matches!(who, Contestant::Other(_)));
    let others = others.map(|who| says(ours, who.name()));
    among_ours.into_iter().chain(others).flatten().collect()
}
