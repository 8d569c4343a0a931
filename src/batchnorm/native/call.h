// What one call of the library is asked to do: plain data, shared by all instruction sets.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace batchnorm {

enum class Type : int { float64, float32, bfloat16, float16 };
enum class Activation : int { none, relu, leaky_relu, elu, silu, gelu, sigmoid, tanh, relu6, hardswish };
constexpr int activations = static_cast<int>(Activation::hardswish) + 1;

// A batch as the kernels see it: N outer positions, C channels, S inner positions.
//   planar        runs of S contiguous values of one channel:  data[n * outer + c * inner + s]
//   interleaved   runs of C contiguous values, one a channel:  data[n * outer + c], S = 1
struct Tensor {
    void* data = nullptr;
    std::int64_t outer = 0, inner = 0;  // steps, in elements
};

// One number a channel, in some type; no data means the default.
struct PerChannel {
    const void* data = nullptr;
    Type type = Type::float32;

    double get(std::int64_t c) const;
};

struct Call {
    Type type;
    bool planar;
    std::int64_t N, C, S;
    // The batch is cut into groups of `group` outer positions, of which the last has what is left, and
    // each is normalized on its own: what is (C) here is then (groups, C). See groups.h.
    std::int64_t groups = 1, group = 0;
    std::int64_t values;          // of the whole batch, of which this may be a group
    int threads;
    int beside = 1;               // so many calls run at once, and share the caches
    Activation activation;
    double parameter;
    PerChannel weight, bias;      // (C)
    Tensor x, residual;
    const void* mask = nullptr;   // (N, S), in the type of the arithmetic, or none
    double* mean = nullptr;       // (C): in, or out where the moments are collected
    double* inverse_std = nullptr;  // (C): likewise
};

// y from x; with `collect`, by the batch's own moments, which are written to the call's arrays.
struct Forward : Call {
    Tensor y;                 // none: only collect
    bool collect;
    PerChannel running_mean, running_var;  // (C): what to normalize by, or none
    double eps, correction;
    double* m2 = nullptr;     // (C), out
    double* count = nullptr;  // one number a group, out
};

// dx, and the gradients of weight and bias, from dy.
struct Backward : Call {
    Tensor dy, dx, dresidual;    // no dx: only reduce
    bool reduce;                 // sum_g and sum_g_xhat are computed, and are there otherwise
    bool through;                // the moments depend on x
    const double* count = nullptr;  // one number a group: what the sums are divided by,
    double correction;              // and what is taken off it first
    double* sum_g = nullptr;       // (C), in or out
    double* sum_g_xhat = nullptr;  // (C), in or out
};

struct Kernels {
    const char* name;
    void (*forward)(const Forward&);
    void (*backward)(const Backward&);
};

// Compiled several times, for one instruction set each.
extern const Kernels baseline_kernels, avx2_kernels, avx512_kernels;

// What is used: the best that this processor can run, or what was chosen.
const Kernels& kernels();

// The names of what this processor can run, the best first; and the choice of another one.
std::vector<std::string> instructions();
void use_instructions(const std::string& name);

}  // namespace batchnorm
