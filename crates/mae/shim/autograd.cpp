// Derivatives with respect to any outputs, with a C interface for src/autograd.rs.
//
// No exception leaves the function: what went wrong is written as text.

#include <cstring>
#include <exception>

#include <torch/csrc/autograd/autograd.h>

namespace {
constexpr int kKeepGraph = 1;
constexpr int kAllowUnused = 2;

void write(char *out, size_t n, const char *text) {
  if (n > 0) {
    std::strncpy(out, text, n - 1);
    out[n - 1] = '\0';
  }
}
} // namespace

// Computes the derivatives of `output`, weighted with `weight` (null: with 1), with respect to `n`
// inputs. Writes a new tensor for each to `grads`, or null where the input has no part in the
// output. Returns 0; or -1 and writes no tensor, but the reason, cut to `error_bytes`.
extern "C" int lacuna_torch_grad(const at::Tensor *output, const at::Tensor *weight,
                                 const at::Tensor *const *inputs, size_t n, int flags,
                                 at::Tensor **grads, char *error, size_t error_bytes) {
  try {
    torch::autograd::variable_list wanted;
    wanted.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      wanted.push_back(*inputs[i]);
    }
    torch::autograd::variable_list weights;
    if (weight != nullptr) {
      weights.push_back(*weight);
    }
    const auto found = torch::autograd::grad({*output}, wanted, weights,
                                             (flags & kKeepGraph) != 0, /*create_graph=*/false,
                                             (flags & kAllowUnused) != 0);
    for (size_t i = 0; i < n; ++i) {
      grads[i] = found[i].defined() ? new at::Tensor(found[i]) : nullptr;
    }
    return 0;
  } catch (const std::exception &failure) {
    write(error, error_bytes, failure.what());
  } catch (...) {
    write(error, error_bytes, "an exception without a text");
  }
  return -1;
}
