//! `onpolicy bench rollout`: new tokens a second, in process, over HTTP, and of other servers.

use super::{
    cli::{Common, positive},
    client::{Asks, Server},
    compare::Compare,
    report::{Line, Report, Unit},
    session::{Round, Session, peak_memory},
    workload::{Prompt, Workload},
};
use crate::server;
use anyhow::ensure;
use clap::Args;
use onpolicy_engine::{
    collect::collect, engine::EngineHandle, http::metrics::PrometheusHandle,
    model::config::ModelConfig, sampler::stream_of,
};
use onpolicy_plugin_api::{Request, SamplingParams};
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
    let sharing = !arguments.no_sharing;
    let mut session =
        Session::start(&arguments.common, |model| memory(&workloads, sharing, &model.config))?;
    let http = serve(&session, metrics)?;
    let mut contestants = arguments.contestants(&session, &http.url())?;
    contestants.extend(others.into_iter().map(Contestant::Other));
    let mut seconds = vec![vec![Vec::new(); contestants.len()]; workloads.len()];
    let mut counted = vec![None; contestants.len()];
    for (turn, round) in session.rounds().enumerate() {
        for (workload, seconds) in workloads.iter().zip(&mut seconds) {
            let prompts = Prompts::new(workload, &session, round)?;
            for place in 0..contestants.len() {
                // Whoever goes first in one run goes last in the next.
                let who = (turn + place) % contestants.len();
                let (time, counts) = contestants[who].rollout(&prompts)?;
                counted[who] = counted[who].or(counts);
                if round.counts {
                    seconds[who].push(time);
                }
            }
        }
    }
    let memory = peak_memory("process");
    http.stop();
    let mut lines = Vec::new();
    let rates = session.rates();
    for (workload, seconds) in workloads.iter().zip(&seconds) {
        for (contestant, seconds) in contestants.iter().zip(seconds) {
            let need = rates.need(&session.costs.rollout(workload, contestant.shares()));
            let unit = Unit::PerSecond(workload.all_new_tokens() as f64, "tokens");
            let group = workload.describe();
            lines.push(Line::times(&group, contestant.name(), unit, seconds, Some(need)));
        }
    }
    let mut notes = ratios(&contestants, &workloads, &lines);
    notes.extend(contestants.iter().zip(&counted).filter_map(|(who, counts)| {
        let (theirs, ours) = (*counts)?;
        (theirs != ours)
            .then(|| format!("{} counts {theirs} prompt tokens where we count {ours}", who.name()))
    }));
    lines.extend(memory);
    Ok(session.report("rollout", lines, notes))
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
        let engine = || session.served.engine.clone();
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
    let server = server::start(&config, &session.served, metrics)?;
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

    fn shares(&self) -> bool {
        !matches!(self, Self::Unshared(_))
    }

    /// Seconds of one rollout.
    fn rollout(&self, prompts: &Prompts<'_>) -> Result<(f64, Counts), anyhow::Error> {
        let Prompts { workload, shared, unshared, seed } = prompts;
        match self {
            Self::InProcess(engine) => Ok((in_process(engine, workload, shared, *seed)?, None)),
            Self::Unshared(engine) => {
                Ok((in_process(engine, &workload.unshared(), unshared, *seed)?, None))
            }
            Self::Http(server, engine) => {
                forget_prefixes(engine)?;
                Ok((server.rollout(workload, shared, *seed)?.seconds, None))
            }
            Self::Other(server) => {
                let rollout = server.rollout(workload, shared, *seed)?;
                let ours = shared.iter().map(|prompt| prompt.ids.len() as u64).sum();
                Ok((rollout.seconds, rollout.prompt_tokens.map(|theirs| (theirs, ours))))
            }
        }
    }
}

/// The engine has answered the same prompts just now: a new version of the (same) weights makes
/// it forget them.
fn forget_prefixes(engine: &EngineHandle) -> Result<(), anyhow::Error> {
    engine.update(|| Ok(()))?;
    Ok(())
}

/// Seconds of one rollout without HTTP.
fn in_process(
    engine: &EngineHandle,
    workload: &Workload,
    prompts: &[Prompt],
    seed: u64,
) -> Result<f64, anyhow::Error> {
    forget_prefixes(engine)?;
    let request = |(index, prompt): (usize, &Prompt)| Request {
        prompt: prompt.ids.clone(),
        params: SamplingParams {
            n: workload.samples,
            max_tokens: workload.new_tokens,
            ignore_eos: true,
            seed: Some(stream_of(seed, index)),
            ..SamplingParams::default()
        },
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

/// How the contestants' medians stand to each other.
fn ratios(contestants: &[Contestant], workloads: &[Workload], lines: &[Line]) -> Vec<String> {
    let mut notes = Vec::new();
    for (workload, lines) in workloads.iter().zip(lines.chunks(contestants.len())) {
        let median = |name: &str| Some(lines.iter().find(|line| line.name == name)?.median);
        let mut say = |fast: &str, slow: &str| {
            if let Some((fast_median, slow_median)) = median(fast).zip(median(slow)) {
                let times = fast_median / slow_median;
                notes.push(format!("{}: {fast} = {times:.2} x {slow}", workload.name));
            }
        };
        say(IN_PROCESS, WITH_LOGPROBS);
        say(TEXT_ONLY, WITH_LOGPROBS);
        say(IN_PROCESS, UNSHARED);
        let ours = if median(WITH_LOGPROBS).is_some() { WITH_LOGPROBS } else { TEXT_ONLY };
        for contestant in contestants {
            if let Contestant::Other(server) = contestant {
                say(ours, &server.name);
            }
        }
    }
    notes
}
