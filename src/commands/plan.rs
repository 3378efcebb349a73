//! `onpolicy plan`

use crate::cli;
use onpolicy_engine::{device::Placement, model::loading::shape};
use onpolicy_trainer::{
    config::{Config, DeviceName, Dtype},
    memory_plan::{MemoryPlan, Subject, Table},
    metrics::memory,
};
use serde_json::json;
use tch::Device;

/// What libraries and their threads take of main memory, about.
const LIBRARIES: usize = 256 << 20;

pub fn run(arguments: &cli::Plan) -> Result<(), anyhow::Error> {
    let config = arguments.config()?;
    let model = shape(&config.model.path)?;
    let given = arguments.memory_gb.map(|gb| (gb * f64::from(1 << 30)) as usize);
    let placement = placement(&config, given.is_some())?;
    let memory = given.or_else(|| memory::total(placement.device));
    let prompts = vec![arguments.prompt_tokens; config.rollout.prompts_per_step];
    let others = if placement.device.is_cuda() { 0 } else { LIBRARIES };
    let plan = MemoryPlan::new(&Subject {
        model: &model,
        config: &config,
        prompts: &prompts,
        placement,
        others,
        memory,
    });
    let verdict = plan.check();
    if arguments.json {
        let why = verdict.as_ref().err().map(ToString::to_string);
        let parameters = model.parameter_count();
        let answer = json!({ "parameters": parameters, "plan": plan, "refused": why });
        println!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        print!(
            "{}{}",
            heading(&config, model.parameter_count(), placement, &prompts),
            Table(&plan)
        );
    }
    Ok(verdict?)
}

/// Where the tensors would live. Where the memory is given there need be no device.
fn placement(config: &Config, given: bool) -> Result<Placement, anyhow::Error> {
    if given && config.model.device == DeviceName::Cuda {
        config.model.set_kernels_aside();
        let kind = config.model.dtype.unwrap_or(Dtype::Bf16).kind();
        return Ok(Placement { device: Device::Cuda(0), kind });
    }
    Ok(config.model.placement()?)
}

fn heading(config: &Config, parameters: usize, placement: Placement, prompts: &[usize]) -> String {
    let (rollout, train) = (&config.rollout, &config.train);
    let kept = if train.activation_checkpointing { "run again" } else { "kept" };
    format!(
        "{}: {:.1} M parameters ({placement}); {} prompts of {} tokens x {} samples of {}; passes of \
         {} rows, activations {kept}\n",
        config.model.path,
        parameters as f64 / 1e6,
        prompts.len(),
        prompts.first().copied().unwrap_or(0),
        rollout.group_size,
        rollout.max_new_tokens,
        train.pass_tokens(placement.device),
    )
}
