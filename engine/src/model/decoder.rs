//! The decoder: one piece of code for prefill, decode and training.

use super::{
    attention::{Attention, LayerShape},
    config::ModelConfig,
    joined::joined,
    rope::{HeadNorms, Rope, Rotation, Turn},
};
use crate::{
    cuda::product::Output,
    device::{Placement, tuning::Products},
    kernels::matmul::narrow::Narrow,
    ops::{
        linear::{linear, linear_each, logits, narrow_linear},
        rms_norm::{add_rms_norm, rms_norm},
        swiglu::{gated, swiglu},
    },
    profile::{Phase, timed},
    torch::slices::floats,
    weights::{ServeDtype, Weights},
};
use tch::Tensor;

/// `y = x W^T + b`.
struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    /// What is multiplied with in the weight's place, where one is served in a narrow type.
    narrow: Option<Narrow>,
}

impl Linear {
    fn new(weight: Tensor, bias: Option<Tensor>, dtype: ServeDtype) -> Self {
        let (rows, depth) = weight.size2().expect("a weight has two axes");
        let narrow = |format| Narrow::new(format, [rows as usize, depth as usize]);
        Self { bias, narrow: dtype.format().map(narrow), weight }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        timed(Phase::Linear, || self.multiply(x))
    }

    fn multiply(&self, x: &Tensor) -> Tensor {
        match &self.narrow {
            Some(narrow) => narrow_linear(x, narrow, self.bias.as_ref()),
            None => linear(x, &self.weight, self.bias.as_ref()),
        }
    }
}

/// Linear layers with the same input.
struct Parallel<const N: usize> {
    layers: [Linear; N],
    /// All of them as one, where their weights lie one after the other.
    joined: Option<Linear>,
}

impl<const N: usize> Parallel<N> {
    fn new(layers: [Linear; N]) -> Self {
        Self { joined: Self::whole(&layers), layers }
    }

    fn whole(layers: &[Linear; N]) -> Option<Linear> {
        let weight = joined(&layers.each_ref().map(|layer| &layer.weight))?;
        let biases: Vec<&Tensor> = layers.iter().filter_map(|layer| layer.bias.as_ref()).collect();
        let bias = match biases.len() {
            0 => None,
            len if len == N => Some(joined(&biases)?),
            _ => return None,
        };
        Some(Linear { weight, bias, narrow: None })
    }

    /// [`Linear::forward`] of each.
    fn forward(&self, x: &Tensor) -> [Tensor; N] {
        if let Some(joined) = &self.joined {
            let (y, mut end) = (joined.forward(x), 0);
            return self.layers.each_ref().map(|layer| {
                let width = layer.weight.size()[0];
                end += width;
                y.narrow(1, end - width, width)
            });
        }
        if self.layers.iter().any(|layer| layer.narrow.is_some()) {
            return self.layers.each_ref().map(|layer| layer.forward(x));
        }
        let layers = self.layers.each_ref().map(|layer| (&layer.weight, layer.bias.as_ref()));
        timed(Phase::Linear, || linear_each(x, layers))
    }
}

/// Root-mean-square norm over the last axis.
struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    fn forward(&self, x: &Tensor) -> Tensor {
        rms_norm(x, &self.weight, self.eps)
    }

    /// `x + y`, and the norm of it.
    fn forward_sum(&self, x: Tensor, y: Option<Tensor>) -> (Tensor, Tensor) {
        match y {
            Some(y) => add_rms_norm(&x, &y, &self.weight, self.eps),
            None => {
                let normed = rms_norm(&x, &self.weight, self.eps);
                (x, normed)
            }
        }
    }
}

struct SelfAttention {
    qkv: Parallel<3>,
    o: Linear,
    /// Of each head of q and k.
    head_norms: Option<[RmsNorm; 2]>,
    head_dim: i64,
    shape: LayerShape,
}

impl SelfAttention {
    fn forward(&self, x: &Tensor, rotation: &Rotation, attention: &mut Attention<'_>) -> Tensor {
        let [q, k, v] = self.qkv.forward(x).map(|rows| rows.view([x.size()[0], -1, self.head_dim]));
        let norms = self.head_norms.as_ref().map(|norms| HeadNorms {
            weights: norms.each_ref().map(|norm| &norm.weight),
            eps: norms[0].eps,
        });
        let attended = attention.attend([&q, &k, &v], &Turn { norms, rotation }, self.shape);
        self.o.forward(&attended)
    }
}

struct Mlp {
    gate_up: Parallel<2>,
    down: Linear,
}

impl Mlp {
    fn forward(&self, x: &Tensor) -> Tensor {
        let made = match &self.gate_up.joined {
            Some(both) => timed(Phase::Linear, || gated(x, &both.weight, both.bias.as_ref())),
            None => {
                let [gate, up] = self.gate_up.forward(x);
                swiglu(&gate, &up)
            }
        };
        self.down.forward(&made)
    }
}

struct Layer {
    input_norm: RmsNorm,
    attention: SelfAttention,
    post_attention_norm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn linears(&mut self) -> [&mut Linear; 7] {
        let (attention, mlp) = (&mut self.attention, &mut self.mlp);
        let [q, k, v] = attention.qkv.layers.each_mut();
        let [gate, up] = mlp.gate_up.layers.each_mut();
        [q, k, v, &mut attention.o, gate, up, &mut mlp.down]
    }

    /// From the residual stream `x`, to which `last`, if there is one, has yet to be added, to the
    /// stream after this layer, again with something yet to be added: the next norm does both.
    fn forward(
        &self,
        (x, last): (Tensor, Option<Tensor>),
        rotation: &Rotation,
        attention: &mut Attention<'_>,
    ) -> (Tensor, Tensor) {
        let (x, normed) = self.input_norm.forward_sum(x, last);
        let attended = self.attention.forward(&normed, rotation, attention);
        let (x, normed) = self.post_attention_norm.forward_sum(x, Some(attended));
        (x, self.mlp.forward(&normed))
    }
}

/// A decoder of the Llama family over shared weights: Llama, Qwen2, Qwen3, Mistral.
pub struct Decoder {
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    rope: Rope,
}

impl Decoder {
    /// Builds the decoder over handles to `weights`; nothing is copied.
    ///
    /// # Panics
    /// If a tensor is missing: loading has checked them against [`ModelConfig::tensor_shapes`].
    pub fn new(config: &ModelConfig, weights: &Weights) -> Self {
        Self::build(Builder { config, weights, dtype: ServeDtype::F32 })
    }

    /// As [`Decoder::new`], for serving: where `dtype` is narrow, the linear layers and the head
    /// multiply with copies in it, which [`Decoder::refresh`] makes anew. It has no gradients then.
    ///
    /// # Panics
    /// As [`Decoder::new`].
    pub fn serving(config: &ModelConfig, weights: &Weights, dtype: ServeDtype) -> Self {
        let mut decoder = Self::build(Builder { config, weights, dtype });
        decoder.refresh();
        decoder
    }

    fn build(build: Builder<'_>) -> Self {
        let config = build.config;
        let embedding = build.tensor("model.embed_tokens.weight");
        let device = embedding.device();
        let head = if config.tie_word_embeddings {
            embedding.shallow_clone()
        } else {
            build.tensor("lm_head.weight")
        };
        Self {
            embedding,
            layers: (0..config.num_layers).map(|index| build.layer(index)).collect(),
            norm: build.norm("model.norm"),
            head: Linear::new(head, None, build.dtype),
            rope: Rope::new(config, device),
        }
    }

    fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.layers.iter_mut().flat_map(Layer::linears).chain([&mut self.head])
    }

    /// Makes the copies in the narrow type anew, out of the weights as they are now.
    pub fn refresh(&mut self) {
        for linear in self.linears() {
            if let Some(narrow) = &mut linear.narrow {
                narrow.pack(floats(&linear.weight));
            }
        }
    }

    /// Gives the copies' memory back to the system until the next [`Decoder::refresh`]; false if it
    /// does not take it.
    pub fn give_back_copies(&mut self) -> bool {
        let mut copies = self.linears().filter_map(|linear| linear.narrow.as_mut());
        copies.all(Narrow::give_back)
    }

    /// Bytes of the copies; 0 where f32 is served.
    pub fn copied_bytes(&mut self) -> usize {
        self.linears().filter_map(|linear| linear.narrow.as_ref()).map(Narrow::bytes).sum()
    }

    /// Hidden states after the last norm, `[N, hidden]`, of `tokens` at `positions` (`[N]` each).
    pub fn hidden(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        attention: &mut Attention<'_>,
    ) -> Tensor {
        self.hidden_of(self.embed(tokens), positions, attention)
    }

    /// Rows of the embedding, `[N, hidden]`; `tokens` may lie anywhere.
    pub fn embed(&self, tokens: &Tensor) -> Tensor {
        self.embedding.index_select(0, &tokens.to_device(self.embedding.device()))
    }

    /// As [`Decoder::hidden`], from embedded tokens `x`.
    pub fn hidden_of(
        &self,
        x: Tensor,
        positions: &Tensor,
        attention: &mut Attention<'_>,
    ) -> Tensor {
        timed(Phase::Elementwise, || {
            let rotation = self.rope.at(positions);
            let mut stream = (x, None);
            for layer in &self.layers {
                let (x, last) = layer.forward(stream, &rotation, attention);
                stream = (x, Some(last));
            }
            self.norm.forward_sum(stream.0, stream.1).1
        })
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// The rotary embedding of rows at `positions` (`[N]`, i64).
    pub fn rotation(&self, positions: &Tensor) -> Rotation {
        self.rope.at(positions)
    }

    /// Layer `index` alone: `x` and the result are `[N, hidden]`.
    pub fn layer(
        &self,
        index: usize,
        x: &Tensor,
        rotation: &Rotation,
        attention: &mut Attention<'_>,
    ) -> Tensor {
        let stream = (x.shallow_clone(), None);
        let (x, last) = self.layers[index].forward(stream, rotation, attention);
        x + last
    }

    /// The products of a step that kernels are chosen for ([`tuning`](crate::device::tuning)).
    pub fn products(&self) -> Vec<Products<'_>> {
        let layers = |part: &dyn Fn(&Layer) -> Option<&Linear>| -> Vec<_> {
            let parts = self.layers.iter().filter_map(part);
            parts.map(|linear| (&linear.weight, linear.bias.as_ref())).collect()
        };
        let plain = |name, layers| Products { name, layers, output: Output::Plain };
        let gate_up = layers(&|layer| layer.mlp.gate_up.joined.as_ref());
        let all = [
            plain("q, k, v", layers(&|layer| layer.attention.qkv.joined.as_ref())),
            plain("output", layers(&|layer| Some(&layer.attention.o))),
            Products { name: "gate, up", layers: gate_up, output: Output::Gated },
            plain("down", layers(&|layer| Some(&layer.mlp.down))),
            Products {
                name: "head",
                layers: vec![(&self.head.weight, None)],
                output: Output::Wide,
            },
        ];
        all.into_iter().filter(|products| !products.layers.is_empty()).collect()
    }

    /// The norm that follows the last layer.
    pub fn last_norm(&self, x: &Tensor) -> Tensor {
        self.norm.forward(x)
    }

    /// The embedding, `[vocab, hidden]`.
    pub fn embedding(&self) -> &Tensor {
        &self.embedding
    }

    /// Weight of the output head, `[vocab, hidden]`; the embedding itself where they are tied.
    pub fn head(&self) -> &Tensor {
        &self.head.weight
    }

    /// Whether [`Decoder::logits`] multiplies with a copy of the head in a narrow type.
    pub fn head_is_narrow(&self) -> bool {
        self.head.narrow.is_some()
    }

    /// Device and type of the weights.
    pub fn placement(&self) -> Placement {
        Placement::of(&self.embedding)
    }

    /// Logits `[N, vocab]` of hidden states `[N, hidden]`, f32 also where the weights are narrow.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        timed(Phase::Head, || match &self.head.narrow {
            Some(narrow) => narrow_linear(hidden, narrow, None),
            None => logits(hidden, &self.head.weight),
        })
    }
}

/// Picks a decoder's parts out of the weights by their Hugging Face names.
struct Builder<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    dtype: ServeDtype,
}

impl Builder<'_> {
    fn tensor(&self, name: &str) -> Tensor {
        let tensor = self.weights.get(name);
        tensor.unwrap_or_else(|| panic!("the weights lack '{name}'")).shallow_clone()
    }

    fn norm(&self, name: &str) -> RmsNorm {
        RmsNorm { weight: self.tensor(&format!("{name}.weight")), eps: self.config.rms_norm_eps }
    }

    fn linear(&self, name: &str, bias: bool) -> Linear {
        let bias = bias.then(|| self.tensor(&format!("{name}.bias")));
        Linear::new(self.tensor(&format!("{name}.weight")), bias, self.dtype)
    }

    fn layer(&self, index: usize) -> Layer {
        let config = self.config;
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let projection = |part: &str, bias| self.linear(&name(&format!("self_attn.{part}")), bias);
        let head_norms =
            || ["self_attn.q_norm", "self_attn.k_norm"].map(|part| self.norm(&name(part)));
        let mlp = |part: &str| self.linear(&name(&format!("mlp.{part}")), config.mlp_bias);
        Layer {
            input_norm: self.norm(&name("input_layernorm")),
            attention: SelfAttention {
                qkv: Parallel::new(
                    ["q_proj", "k_proj", "v_proj"].map(|part| projection(part, config.qkv_bias)),
                ),
                o: projection("o_proj", config.o_bias),
                head_norms: config.qk_norm.then(head_norms),
                head_dim: config.head_dim as i64,
                shape: LayerShape { index, window: config.layer_window[index] },
            },
            post_attention_norm: self.norm(&name("post_attention_layernorm")),
            mlp: Mlp {
                gate_up: Parallel::new(["gate_proj", "up_proj"].map(mlp)),
                down: mlp("down_proj"),
            },
        }
    }
}
