// The activations and their derivatives, as functions of z; where both exist they are what
// `kernels/activations.py` has, NaN and infinities included.
#pragma once

#include "call.h"
#include "mathematics.h"

namespace BN_ISA {

using batchnorm::Activation;

// What a kernel is compiled for: the common cases by themselves, the rest with run-time choices. There
// the activations of a few instructions are apart from those of many, whose code would slow them down.
enum class Variant { none, relu, relu6, none_residual, relu_residual, piecewise, smooth };

constexpr bool has_choices(Variant v) { return v == Variant::piecewise || v == Variant::smooth; }

constexpr bool is_piecewise(Activation activation) {
    return activation == Activation::none || activation == Activation::relu ||
           activation == Activation::leaky_relu || activation == Activation::relu6 ||
           activation == Activation::hardswish;
}

template <class A> inline values<A> relu(values<A> z) { return larger<A>(values<A>{}, z); }
template <class A> inline values<A> relu6(values<A> z) { return smaller<A>(splat(A(6)), relu<A>(z)); }

template <class A> BN_INLINE values<A> piecewise(values<A> z, Activation activation, A parameter) {
    switch (activation) {
        case Activation::relu: return relu<A>(z);
        case Activation::leaky_relu: return z > 0 ? z : z * parameter;
        case Activation::relu6: return relu6<A>(z);
        case Activation::hardswish: return z * (relu6<A>(z + 3) * A(1 / 6.0));
        default: return z;
    }
}

template <class A> inline values<A> smooth(values<A> z, Activation activation, A parameter) {
    switch (activation) {
        case Activation::elu: return z > 0 ? z : expm1(z) * parameter;
        case Activation::silu: return z / (1 + exp(-z));
        case Activation::gelu: return z * (A(0.5) * (1 + erf(z * A(0.70710678118654752))));
        case Activation::sigmoid: return sigmoid(z);
        case Activation::tanh: return tanh(z);
        default: return z;
    }
}

template <Variant V, class A>
BN_INLINE values<A> activate(values<A> z, Activation activation, A parameter) {
    if constexpr (V == Variant::relu || V == Variant::relu_residual) return relu<A>(z);
    else if constexpr (V == Variant::relu6) return relu6<A>(z);
    else if constexpr (V == Variant::piecewise) return piecewise<A>(z, activation, parameter);
    else if constexpr (V == Variant::smooth) return smooth<A>(z, activation, parameter);
    else return z;
}

// --- g * activation'(z) ---

template <class A> inline values<A> relu_gradient(values<A> g, values<A> z) {
    return z <= 0 ? values<A>{} : g;
}

template <class A> inline values<A> relu6_gradient(values<A> g, values<A> z) {
    return (z <= 0) | (z >= 6) ? values<A>{} : g;
}

template <class A>
BN_INLINE values<A> piecewise_gradient(values<A> g, values<A> z, Activation activation, A parameter) {
    switch (activation) {
        case Activation::relu: return relu_gradient<A>(g, z);
        case Activation::leaky_relu: return z > 0 ? g : g * parameter;
        case Activation::relu6: return relu6_gradient<A>(g, z);
        case Activation::hardswish: {
            const auto below_3 = z < 3 ? g * (z * A(1 / 3.0) + A(0.5)) : g;
            return z <= -3 ? values<A>{} : below_3;
        }
        default: return g;
    }
}

template <class A>
inline values<A> smooth_gradient(values<A> g, values<A> z, Activation activation, A parameter) {
    switch (activation) {
        case Activation::elu: return z > 0 ? g : g * parameter * exp(z > 0 ? values<A>{} : z);
        case Activation::silu: {
            const auto s = sigmoid(z);
            return g * (s * (1 + z * (1 - s)));
        }
        case Activation::gelu: {
            const auto density = exp(A(-0.5) * z * z) * A(0.39894228040143268);
            return g * (A(0.5) * (1 + erf(z * A(0.70710678118654752))) + z * density);
        }
        case Activation::sigmoid: {
            const auto s = sigmoid(z);
            return g * (s * (1 - s));
        }
        case Activation::tanh: {
            const auto t = tanh(z);
            return g * (1 - t * t);
        }
        default: return g;
    }
}

template <Variant V, class A>
BN_INLINE values<A> differentiate(values<A> g, values<A> z, Activation activation, A parameter) {
    if constexpr (V == Variant::relu || V == Variant::relu_residual) return relu_gradient<A>(g, z);
    else if constexpr (V == Variant::relu6) return relu6_gradient<A>(g, z);
    else if constexpr (V == Variant::piecewise) return piecewise_gradient<A>(g, z, activation, parameter);
    else if constexpr (V == Variant::smooth) return smooth_gradient<A>(g, z, activation, parameter);
    else return g;
}

}  // namespace BN_ISA
