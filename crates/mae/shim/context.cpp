// What tch does not offer of libtorch's context, with a C interface for src/context.rs.
//
// No exception leaves a function: each returns a code below zero instead.

#include <cstring>
#include <string>

#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>

namespace {
constexpr int kDeterministic = 1;
constexpr int kTf32 = 2;
} // namespace

extern "C" {

// Sets the flags that decide which kernels run. Returns 0.
int lacuna_torch_set_flags(int flags) {
  try {
    at::Context &context = at::globalContext();
    const bool deterministic = (flags & kDeterministic) != 0;
    const bool tf32 = (flags & kTf32) != 0;
    // Not only a warning: an operation without a deterministic kernel fails.
    context.setDeterministicAlgorithms(deterministic, /*warn_only=*/false);
    // Deterministic mode would otherwise write to all memory before its first use.
    context.setDeterministicFillUninitializedMemory(false);
    context.setDeterministicCuDNN(deterministic);
    context.setBenchmarkCuDNN(false);
    context.setAllowTF32CuBLAS(tf32);
    context.setAllowTF32CuDNN(tf32);
    // Partial sums of products stay f32: by default libtorch lets them be bf16. Sums in parts are
    // allowed, which cuBLAS cannot be kept from (cuBLASLt can).
    context.setAllowBF16ReductionCuBLAS(false, /*allow_splitk=*/true);
    const auto full = at::CuBLASReductionOption::DisallowReducedPrecisionAllowSplitK;
    const bool as_set = context.allowBF16ReductionCuBLAS() == full &&
                        context.deterministicCuDNN() == deterministic &&
                        !context.deterministicAlgorithmsWarnOnly() &&
                        !context.benchmarkCuDNN() &&
                        !context.deterministicFillUninitializedMemory() &&
                        context.allowTF32CuBLAS() == tf32 && context.allowTF32CuDNN() == tf32;
    return as_set ? 0 : -1;
  } catch (...) {
    return -1;
  }
}

// Reads the same flags back; TF32 is reported where any library may use it.
int lacuna_torch_flags() {
  try {
    const at::Context &context = at::globalContext();
    const bool tf32 = context.allowTF32CuBLAS() || context.allowTF32CuDNN();
    return (context.deterministicAlgorithms() ? kDeterministic : 0) | (tf32 ? kTf32 : 0);
  } catch (...) {
    return -1;
  }
}

// Gives unused memory of CUDA devices back. Returns 0.
int lacuna_torch_give_back_memory() {
  try {
    if (at::hasCUDA()) {
      at::getDeviceAllocator(at::kCUDA)->emptyCache();
    }
    return 0;
  } catch (...) {
    return -1;
  }
}

// Returns the version of the CUDA runtime as CUDA counts, 13000 for 13.0.
long lacuna_torch_cuda_runtime() {
  try {
    return at::detail::getCUDAHooks().versionCUDART();
  } catch (...) {
    return -1;
  }
}

// Writes what libtorch says about its CUDA libraries, cut to `n` bytes. Returns the bytes written.
long lacuna_torch_cuda_config(char *out, size_t n) {
  try {
    const std::string text = at::detail::getCUDAHooks().showConfig();
    const size_t length = text.size() < n ? text.size() : n;
    std::memcpy(out, text.data(), length);
    return static_cast<long>(length);
  } catch (...) {
    return -1;
  }
}
}
