// What tch 0.24 does not bind. Every function returns nullptr, or an error message that the caller
// frees with op_free.
#include "guarded.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/torch.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <climits>
#include <cstdlib>
#include <vector>

namespace {

std::vector<at::Tensor> list(at::Tensor *const *tensors, int64_t count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (int64_t i = 0; i < count; ++i) out.push_back(*tensors[i]);
  return out;
}

// What a function in Rust says of its failure.
struct Failure {
  char text[1024] = "the function failed";
};

// A differentiable function whose work is done in Rust. Rust owns the state; `drop` is called once.
struct Callbacks {
  // Null: it failed, and `failure` says why.
  at::Tensor *(*forward)(void *state, at::Tensor *const *inputs, int64_t count, Failure *failure);
  // Fills `gradients`, one owned tensor (or null) for each input. False: it failed.
  bool (*backward)(void *state, at::Tensor *const *inputs, int64_t count, at::Tensor *gradient,
                   at::Tensor **gradients, Failure *failure);
  void (*drop)(void *state);
  // Bit i: `backward` reads input i. The others are not kept for it, and undefined there.
  uint64_t reads;
};

struct State : torch::CustomClassHolder {
  State(const Callbacks *callbacks, void *state) : callbacks(callbacks), state(state) {}
  ~State() override { callbacks->drop(state); }
  const Callbacks *callbacks;
  void *state;
};

std::vector<at::Tensor *> pointers(std::vector<at::Tensor> &tensors) {
  std::vector<at::Tensor *> out;
  for (auto &tensor : tensors) out.push_back(&tensor);
  return out;
}

at::Tensor take(at::Tensor *owned) {
  at::Tensor tensor = std::move(*owned);
  delete owned;
  return tensor;
}

struct RustFunction : torch::autograd::Function<RustFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext *ctx, at::TensorList inputs,
                            const c10::intrusive_ptr<State> &state) {
    std::vector<at::Tensor> all = inputs.vec(), saved = all;
    for (size_t i = 0; i < saved.size(); ++i) {
      if ((state->callbacks->reads >> i & 1) == 0) saved[i].reset();
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["state"] = c10::IValue::make_capsule(state);
    auto raw = pointers(all);
    Failure failure;
    auto *made = state->callbacks->forward(state->state, raw.data(), raw.size(), &failure);
    TORCH_CHECK(made != nullptr, failure.text);
    return take(made);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext *ctx,
                                                 torch::autograd::variable_list gradient) {
    auto capsule = ctx->saved_data["state"].toCapsule();
    auto *state = static_cast<State *>(capsule.get());
    auto saved = ctx->get_saved_variables();
    auto raw = pointers(saved);
    std::vector<at::Tensor *> owned(saved.size(), nullptr);
    Failure failure;
    TORCH_CHECK(state->callbacks->backward(state->state, raw.data(), raw.size(), &gradient[0],
                                           owned.data(), &failure),
                failure.text);
    torch::autograd::variable_list gradients;
    for (auto *tensor : owned) gradients.push_back(tensor == nullptr ? at::Tensor() : take(tensor));
    gradients.emplace_back(); // the state has none
    return gradients;
  }
};

} // namespace

extern "C" {

// Applies the function to the inputs; `output` is a new tensor that the caller owns. The state is
// dropped in any case, when the graph no longer needs it.
char *op_apply(const void *callbacks, void *state, at::Tensor *const *inputs, int64_t count,
               at::Tensor **output) {
  auto holder =
      c10::make_intrusive<State>(static_cast<const Callbacks *>(callbacks), state);
  return guarded([&] {
    *output = new at::Tensor(RustFunction::apply(at::TensorList(list(inputs, count)), holder));
  });
}

void op_free(char *text) { std::free(text); }

// Freed memory stays with the process instead of going back to the system. False: not done here.
bool op_keep_freed_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, INT_MAX) == 1 &&
         mallopt(M_TOP_PAD, 64 << 20) == 1;
#else
  return false;
#endif
}

// Accumulates the gradients of sum(outputs * gradients) into the leaves.
char *op_backward(at::Tensor *const *outputs, at::Tensor *const *gradients, int64_t count) {
  return guarded([&] {
    torch::autograd::backward(list(outputs, count), list(gradients, count));
  });
}

// Whether operations on this thread are recorded for a backward pass.
bool op_recording() { return at::GradMode::is_enabled(); }

// Frees the memory of the tensor's storage, under all of its handles.
char *op_give_back(at::Tensor *tensor) {
  return guarded([&] {
    auto *storage = tensor->storage().unsafeGetStorageImpl();
    TORCH_CHECK(storage->allocator() != nullptr, "the tensor's memory is not the allocator's");
    storage->set_data_ptr_noswap(at::DataPtr(nullptr, storage->device()));
  });
}

// Takes as much memory again, if none is there.
char *op_take(at::Tensor *tensor) {
  return guarded([&] {
    auto *storage = tensor->storage().unsafeGetStorageImpl();
    if (storage->data() != nullptr) return;
    storage->set_data_ptr_noswap(storage->allocator()->allocate(storage->nbytes()));
  });
}

// Overwrites a tensor of a device with one of the host, and does not wait for the device.
char *op_copy_async(at::Tensor *from, at::Tensor *to) {
  return guarded([&] {
    TORCH_CHECK(from->sizes() == to->sizes(), from->sizes(), " is not ", to->sizes());
    to->copy_(*from, true);
  });
}

// A copy of a tensor of the host in pinned memory, which a device reads without the host's help.
char *op_pinned(at::Tensor *tensor, at::Tensor **output) {
  return guarded([&] { *output = new at::Tensor(tensor->pin_memory()); });
}

// What the allocator of CUDA memory holds free goes back to the device.
char *op_empty_cache() {
  return guarded([] { c10::getDeviceAllocator(c10::DeviceType::CUDA)->emptyCache(); });
}

// Makes `gradient` the accumulated gradient of the leaf `tensor`.
char *op_set_grad(at::Tensor *tensor, at::Tensor *gradient) {
  return guarded([&] { tensor->mutable_grad() = *gradient; });
}

// Causal flash attention over sequences of different lengths: `inputs` are q, k, v and where the
// rows and the keys of each sequence begin; `longest` is most rows and most keys of one. A row sees
// `window_left` positions before its own, or all if that is negative. The rows of a sequence are its
// last positions: the kernel's causal mask is aligned at the lower right.
char *op_flash_attention(at::Tensor *const *inputs, const int64_t *longest, int64_t window_left,
                         at::Tensor **output) {
  return guarded([&] {
    const auto given = list(inputs, 5);
    std::optional<int64_t> left, right;
    if (window_left >= 0) {
      left = window_left;
      right = 0;
    }
    auto answer = at::_flash_attention_forward(
        given[0].contiguous(), given[1].contiguous(), given[2].contiguous(), given[3], given[4],
        longest[0], longest[1], /*dropout_p=*/0.0, /*is_causal=*/true,
        /*return_debug_mask=*/false, /*scale=*/std::nullopt, left, right);
    *output = new at::Tensor(std::get<0>(answer));
  });
}

// L2 norm of all tensors together. On a device it is waited for once, not for each tensor.
char *op_total_norm(at::Tensor *const *tensors, int64_t count, double *norm) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    auto parts = at::_foreach_norm(list(tensors, count), 2);
    if (count > 0 && !parts[0].is_cpu()) {
      *norm = at::stack(parts).to(at::kDouble).square().sum().sqrt().item<double>();
      return;
    }
    double sum = 0;
    for (const auto &part : parts) {
      const double value = part.item<double>();
      sum += value * value;
    }
    *norm = std::sqrt(sum);
  });
}

// One AdamW step with bias correction and decoupled weight decay, in place. `grad_scale` divides
// the gradients first.
char *op_adamw(at::Tensor *const *params, at::Tensor *const *grads, at::Tensor *const *first,
               at::Tensor *const *second, at::Tensor *const *steps, int64_t count, double lr,
               double beta1, double beta2, double eps, double weight_decay, double grad_scale) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const auto device = count > 0 ? params[0]->device() : at::Device(at::kCPU);
    const auto scale = at::TensorOptions().dtype(at::kFloat).device(device);
    at::_fused_adamw_(list(params, count), list(grads, count), list(first, count),
                      list(second, count), {}, list(steps, count), lr, beta1, beta2, weight_decay,
                      eps, /*amsgrad=*/false, /*maximize=*/false,
                      at::scalar_tensor(grad_scale, scale), std::nullopt);
  });
}

// Copies each tensor of `from` to that of `to`, in their types.
char *op_copy_each(at::Tensor *const *to, at::Tensor *const *from, int64_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_copy_(list(to, count), list(from, count));
  });
}

} // extern "C"
