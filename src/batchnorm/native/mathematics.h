// exp, tanh and erf on whole vectors, to 1 or 2 units in the last place of a float.
// The polynomials are weighted minimax fits. Doubles go to the standard library, lane by lane.
#pragma once

#include <cmath>

#include "vector.h"

namespace BN_ISA {

template <class A, class F> inline values<A> each(values<A> v, F function) {
    for (int i = 0; i < Vector<A>::lanes; ++i) v[i] = function(v[i]);
    return v;
}

// x = n log(2) + rest, with |rest| <= log(2) / 2: returns exp(rest) - 1, and two factors of 2^n, for
// 2^n alone may be too large or too small for a float. NaN stays NaN.
struct Exponential { floats rest, half, other; };

inline Exponential split_exponential(floats x) {
    x = x > 89.0f ? splat(89.0f) : x;
    x = x < -105.0f ? splat(-105.0f) : x;
    const floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const floats shifted = x * 1.44269504f + magic;
    const floats n = shifted - magic;
    floats r = x - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    floats q = splat(1.979006675e-04f);
    q = q * r + 1.394494325e-03f;
    q = q * r + 8.333498787e-03f;
    q = q * r + 4.166629118e-02f;
    q = q * r + 1.666666586e-01f;
    q = q * r + 5.000000069e-01f;
    const auto power = cast<Vector<float>::integers>(shifted) - 0x4b400000;
    const auto half = power >> 1;
    const floats left = cast<floats>((half + 127) << 23);
    const floats right = cast<floats>((power - half + 127) << 23);
    return {q * (r * r) + r, left, right};
}

inline floats exp(floats x) {
    const Exponential e = split_exponential(x);
    return (1.0f + e.rest) * e.half * e.other;
}

inline floats expm1(floats x) {
    const Exponential e = split_exponential(x);
    const floats scale = e.half * e.other;
    // where 2^n is infinite so is the result; the sum would be infinity - infinity for rest < 0
    const floats result = e.rest * scale + (scale - 1.0f);
    return x > 88.0f ? (1.0f + e.rest) * e.half * e.other : result;
}

inline floats tanh(floats x) {
    const floats s = x * x;
    floats p = splat(-5.717036561e-03f);
    p = p * s + 2.065057900e-02f;
    p = p * s + -5.374349526e-02f;
    p = p * s + 1.333149125e-01f;
    p = p * s + -3.333328392e-01f;
    const floats near = x + x * (s * p);
    const floats size = x < 0.0f ? -x : x;
    const floats far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    const floats signed_far = x < 0.0f ? -far : far;
    return size < 0.625f ? near : signed_far;
}

inline floats erf(floats x) {
    const floats s = x * x;
    floats p = splat(8.382388031e-05f);
    p = p * s + -8.145596910e-04f;
    p = p * s + 5.201286024e-03f;
    p = p * s + -2.685950008e-02f;
    p = p * s + 1.128369732e-01f;
    p = p * s + -3.761263385e-01f;
    p = p * s + 1.283791671e-01f;  // 2 / sqrt(pi) = 1 + this
    const floats near = x * p + x;
    floats size = x < 0.0f ? -x : x;
    const auto is_near = size < 0.92f;
    size = size > 4.0f ? splat(4.0f) : size;  // erf(4) rounds to 1
    floats q = splat(-2.139859232e-04f);
    q = q * size + 3.214963084e-03f;
    q = q * size + -2.288998651e-02f;
    q = q * size + 1.052618754e-01f;
    q = q * size + 6.357182925e-01f;
    q = q * size + 1.128514367e+00f;
    const floats far = 1.0f - exp(-size * q);
    const floats signed_far = x < 0.0f ? -far : far;
    return is_near ? near : signed_far;
}

inline values<double> exp(values<double> v) { return each<double>(v, [](double x) { return std::exp(x); }); }
inline values<double> expm1(values<double> v) { return each<double>(v, [](double x) { return std::expm1(x); }); }
inline values<double> tanh(values<double> v) { return each<double>(v, [](double x) { return std::tanh(x); }); }
inline values<double> erf(values<double> v) { return each<double>(v, [](double x) { return std::erf(x); }); }

template <class V> inline V sigmoid(V z) { return 1 / (1 + exp(-z)); }

}  // namespace BN_ISA
