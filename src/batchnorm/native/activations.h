// The activations and their derivatives, as functions of z; where both exist they are what
// `kernels/activations.py` has, NaN and infinities included.
#pragma once

#include "call.h"
#include "mathematics.h"

namespace BN_ISA {

using batchnorm::Activation;

template <class A> inline values<A> relu(values<A> z) { return larger<A>(values<A>{}, z); }

template <class A> inline values<A> activate(values<A> z, Activation activation, A parameter) {
    switch (activation) {
        case Activation::none: return z;
        case Activation::relu: return relu<A>(z);
        case Activation::leaky_relu: return z > 0 ? z : z * parameter;
        case Activation::elu: return z > 0 ? z : expm1(z) * parameter;
        case Activation::silu: return z / (1 + exp(-z));
        case Activation::gelu: return z * (A(0.5) * (1 + erf(z * A(0.70710678118654752))));
        case Activation::sigmoid: return sigmoid(z);
        case Activation::tanh: return tanh(z);
    }
    return z;
}

// g * activation'(z).
template <class A>
inline values<A> differentiate(values<A> g, values<A> z, Activation activation, A parameter) {
    switch (activation) {
        case Activation::none: return g;
        case Activation::relu: return z <= 0 ? values<A>{} : g;
        case Activation::leaky_relu: return z > 0 ? g : g * parameter;
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
    }
    return g;
}

// What a kernel is compiled for: the common cases by themselves, the rest with run-time choices.
enum class Variant { none, relu, none_residual, relu_residual, general };

}  // namespace BN_ISA
