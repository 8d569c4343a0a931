// What this processor is: which instructions it knows and how large its caches are.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <thread>

#include "cache.h"
#include "call.h"

namespace batchnorm {

double PerChannel::get(std::int64_t c) const {
    switch (type) {
        case Type::float64: return static_cast<const double*>(data)[c];
        case Type::float32: return static_cast<const float*>(data)[c];
        case Type::bfloat16: {
            const std::uint32_t bits = std::uint32_t{static_cast<const std::uint16_t*>(data)[c]} << 16;
            float value;
            std::memcpy(&value, &bits, sizeof value);
            return value;
        }
        case Type::float16: {
            const std::uint32_t half = static_cast<const std::uint16_t*>(data)[c];
            const std::uint32_t shifted = (half & 0x7fff) << 13;
            float value;
            std::memcpy(&value, &shifted, sizeof value);
            value *= 0x1p112f;
            if (value >= 65536) value = shifted & 0x7fffff ? NAN : INFINITY;  // the largest exponent
            return half & 0x8000 ? -value : value;
        }
    }
    return NAN;
}

namespace {

std::int64_t pretended = 0;

}  // namespace

std::int64_t cache_bytes() {
    static const std::int64_t bytes = [] {
        // What Linux says of the cache that a core sees; but a virtual machine of few cores, which it
        // may show the whole of a large one, has only so much of that to itself.
        const std::int64_t share = std::int64_t{16 << 20} * std::max(1u, std::thread::hardware_concurrency());
        for (const char* path : {"/sys/devices/system/cpu/cpu0/cache/index3/size",
                                 "/sys/devices/system/cpu/cpu0/cache/index2/size"}) {
            if (std::FILE* const file = std::fopen(path, "r")) {
                long kilobytes = 0;
                const bool read = std::fscanf(file, "%ldK", &kilobytes) == 1;
                std::fclose(file);
                if (read && kilobytes > 0) return std::min(std::int64_t{kilobytes} << 10, share);
            }
        }
        return std::int64_t{8} << 20;
    }();
    return pretended ? pretended : bytes;
}

void pretend_cache(std::int64_t bytes) { pretended = bytes; }

namespace {

// What this processor can run, the best first.
std::vector<const Kernels*> runnable() {
    std::vector<const Kernels*> found;
#if defined(BN_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
            found.push_back(&avx512_kernels);
        found.push_back(&avx2_kernels);
    }
#endif
    found.push_back(&baseline_kernels);
    return found;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels{runnable().front()};
    return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> instructions() {
    std::vector<std::string> names;
    for (const Kernels* const kernels : runnable()) names.emplace_back(kernels->name);
    return names;
}

void use_instructions(const std::string& name) {
    for (const Kernels* const kernels : runnable())
        if (kernels->name == name) return chosen().store(kernels);
    throw std::invalid_argument("this processor does not have the instructions " + name);
}

}  // namespace batchnorm
