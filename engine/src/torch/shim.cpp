// What tch 0.24 does not bind. Every function returns nullptr, or an error message that the caller
// frees with op_free.
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/torch.h>

#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

char *message(const char *what) {
  char *copy = static_cast<char *>(std::malloc(std::strlen(what) + 1));
  if (copy != nullptr) std::strcpy(copy, what);
  return copy;
}

template <typename F> char *guarded(F body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error &error) {
    return message(error.what_without_backtrace());
  } catch (const std::exception &error) {
    return message(error.what());
  } catch (...) {
    return message("an unknown C++ exception");
  }
}

std::vector<at::Tensor> list(at::Tensor *const *tensors, int64_t count) {
  std::vector<at::Tensor> out;
  out.reserve(count);
  for (int64_t i = 0; i < count; ++i) out.push_back(*tensors[i]);
  return out;
}

} // namespace

extern "C" {

void op_free(char *text) { std::free(text); }

// Calls body(context, worker) on each of libtorch's intra-op threads that take part, at most `workers`.
char *op_parallel(int64_t workers, void (*body)(void *, int64_t), void *context) {
  return guarded([&] {
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
    });
  });
}

// Accumulates the gradients of sum(outputs * gradients) into the leaves.
char *op_backward(at::Tensor *const *outputs, at::Tensor *const *gradients, int64_t count) {
  return guarded([&] {
    torch::autograd::backward(list(outputs, count), list(gradients, count));
  });
}

// Makes `gradient` the accumulated gradient of the leaf `tensor`.
char *op_set_grad(at::Tensor *tensor, at::Tensor *gradient) {
  return guarded([&] { tensor->mutable_grad() = *gradient; });
}

// L2 norm of all tensors together.
char *op_total_norm(at::Tensor *const *tensors, int64_t count, double *norm) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    double sum = 0;
    for (const auto &part : at::_foreach_norm(list(tensors, count), 2)) {
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
    at::_fused_adamw_(list(params, count), list(grads, count), list(first, count),
                      list(second, count), {}, list(steps, count), lr, beta1, beta2, weight_decay,
                      eps, /*amsgrad=*/false, /*maximize=*/false,
                      at::scalar_tensor(grad_scale, at::kFloat), std::nullopt);
  });
}

} // extern "C"
