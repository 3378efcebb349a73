//! Models of well-known shapes with random weights, where the weights themselves are not at hand.

use onpolicy_engine::{
    device::Placement,
    model::{
        config::ModelConfig,
        joined::join,
        loading::{Checkpoint, load, shape},
    },
};
use serde_json::{Value, json};
use tch::Tensor;

/// Standard deviation of the random weights, as models are initialised.
const SPREAD: f64 = 0.02;

/// Shapes that can be named: hidden size, inner size, layers, heads, heads of K and V, vocabulary,
/// and whether the head is the embedding.
const NAMED: [(&str, [usize; 6], bool); 4] = [
    ("qwen2.5-0.5b", [896, 4864, 24, 14, 2, 151_936], true),
    ("qwen2.5-1.5b", [1536, 8960, 28, 12, 2, 151_936], true),
    ("qwen2.5-7b", [3584, 18_944, 28, 28, 4, 152_064], false),
    ("tiny", [128, 352, 2, 2, 1, 512], true),
];

/// A shape to make random weights in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    name: String,
    source: Source,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    Named(usize),
    File(String),
}

impl Shape {
    /// A named shape, or that of a `config.json` or a model.
    ///
    /// # Errors
    /// There is neither; the message names the shapes that there are.
    pub fn parse(text: &str) -> Result<Self, String> {
        let named = NAMED.iter().position(|(name, ..)| name.eq_ignore_ascii_case(text));
        if let Some(index) = named {
            return Ok(Self { name: NAMED[index].0.into(), source: Source::Named(index) });
        }
        if std::path::Path::new(text).exists() {
            return Ok(Self { name: text.into(), source: Source::File(text.into()) });
        }
        let known = NAMED.map(|(name, ..)| name).join(", ");
        Err(format!("there is no shape '{text}'; there are: {known}, or a path to a config.json"))
    }

    /// The model's shape.
    ///
    /// # Errors
    /// A file that cannot be read, or is of no model that runs here.
    pub fn config(&self) -> Result<ModelConfig, anyhow::Error> {
        match &self.source {
            Source::Named(index) => Ok(ModelConfig::from_hf(&hugging_face(*index), None)?),
            Source::File(path) => Ok(shape(path)?),
        }
    }

    /// A model of this shape with random weights and the tokenizer of the model at `tokenizer`.
    ///
    /// # Errors
    /// A tokenizer that cannot be loaded, or memory that does not suffice.
    pub fn random(
        &self,
        tokenizer: &str,
        placement: Placement,
    ) -> Result<Checkpoint, anyhow::Error> {
        let config = self.config()?;
        #[expect(
            clippy::disallowed_methods,
            reason = "draws on the device, with no thread beside"
        )]
        tch::manual_seed(1);
        let tensors = config.tensor_shapes().into_iter().map(|(name, shape)| {
            let tensor = random(&name, &shape, placement)?;
            Ok((name, tensor))
        });
        let mut tensors = tensors.collect::<Result<Vec<_>, tch::TchError>>()?;
        join(&mut tensors)?;
        let Checkpoint { tokenizer, source, .. } = load(tokenizer)?;
        let name = format!("{} (random weights)", self.name);
        Ok(Checkpoint { name, config, tensors, tokenizer, source })
    }
}

fn random(name: &str, shape: &[i64], placement: Placement) -> Result<Tensor, tch::TchError> {
    let options = (placement.kind, placement.device);
    if name.ends_with("norm.weight") {
        return Tensor::f_ones(shape, options);
    }
    // Without a second tensor of this size.
    Tensor::f_empty(shape, options)?.f_normal_(0.0, SPREAD)
}

/// As the model's `config.json` has it.
fn hugging_face(index: usize) -> Value {
    let [hidden, inner, layers, heads, kv_heads, vocab] = NAMED[index].1;
    json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": NAMED[index].2,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    /// The sizes that the models' cards give.
    #[test]
    fn shapes_have_the_parameters_of_their_models() {
        let count = |name: &str| {
            let shape = Shape::parse(name).expect("a name").config().expect("a shape");
            shape.parameter_count()
        };
        assert_eq!(count("Qwen2.5-0.5B"), 494_032_768);
        assert_eq!(count("qwen2.5-1.5b"), 1_543_714_304);
        assert_eq!(count("qwen2.5-7b"), 7_615_616_512);
        let error = Shape::parse("qwen9").expect_err("no such shape");
        assert!(error.contains("qwen2.5-0.5b, qwen2.5-1.5b"), "{error}");
    }

    #[test]
    fn random_weights_are_of_the_placement() {
        let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/tiny/llama-tied");
        let placement = Placement { kind: Kind::BFloat16, ..Placement::NATIVE };
        let shape = Shape::parse("tiny").expect("a name");
        let model = shape.random(tiny, placement).expect("a model");
        assert_eq!(model.tensors.len(), model.config.tensor_shapes().len());
        let spread = |name: &str| {
            let (_, tensor) = model.tensors.iter().find(|(n, _)| n == name).expect("a tensor");
            assert_eq!(Placement::of(tensor), placement);
            tensor.to_kind(Kind::Float).std(false).double_value(&[])
        };
        assert!((spread("model.embed_tokens.weight") - SPREAD).abs() < 1e-3);
        assert_eq!(spread("model.norm.weight"), 0.0);
    }
}
