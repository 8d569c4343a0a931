// The kernels for one instruction set: compiled once for each, with BN_ISA and BN_BYTES given.
#include "driver.h"

namespace batchnorm {

namespace {

template <bool Planar> void forward(const Forward& call) {
    switch (call.type) {
        case Type::float64: return BN_ISA::forward<double, Planar>(call);
        case Type::float32: return BN_ISA::forward<float, Planar>(call);
        case Type::bfloat16: return BN_ISA::forward<BN_ISA::bfloat16, Planar>(call);
        case Type::float16: return BN_ISA::forward<BN_ISA::float16, Planar>(call);
    }
}

template <bool Planar> void backward(const Backward& call) {
    switch (call.type) {
        case Type::float64: return BN_ISA::backward<double, Planar>(call);
        case Type::float32: return BN_ISA::backward<float, Planar>(call);
        case Type::bfloat16: return BN_ISA::backward<BN_ISA::bfloat16, Planar>(call);
        case Type::float16: return BN_ISA::backward<BN_ISA::float16, Planar>(call);
    }
}

}  // namespace

#define BN_TEXT(name) BN_TEXT_OF(name)
#define BN_TEXT_OF(name) #name
#define BN_JOIN(a, b) BN_JOIN_OF(a, b)
#define BN_JOIN_OF(a, b) a##b

extern const Kernels BN_JOIN(BN_ISA, _kernels) = {
    BN_TEXT(BN_ISA),
    [](const Forward& call) { call.planar ? forward<true>(call) : forward<false>(call); },
    [](const Backward& call) { call.planar ? backward<true>(call) : backward<false>(call); },
};

}  // namespace batchnorm
