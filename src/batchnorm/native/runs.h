// What happens to a run of contiguous values: of one channel (planar: the numbers of the channel
// hold for all of them, each position has its weight), or of one position (interleaved: each value
// has its own channel, the weight holds for all).
#pragma once

#include "activations.h"

namespace BN_ISA {

// A number a value or one for the whole run.
template <class A, bool Each> struct Numbers {
    values<A> all;
    explicit Numbers(const A* numbers) : all(splat(*numbers)) {}
    values<A> at(std::int64_t) const { return all; }
    values<A> at(std::int64_t, int) const { return all; }
};
template <class A> struct Numbers<A, true> {
    const A* numbers;
    explicit Numbers(const A* numbers) : numbers(numbers) {}
    values<A> at(std::int64_t i) const { return load(numbers + i); }
    values<A> at(std::int64_t i, int count) const { return load(numbers + i, count); }
};

// The numbers of the channels: pointers to the first channel of a run.
template <class A> struct Coefficients {
    const A* near;    // the mean, rounded
    const A* scale;   // weight * inverse_std
    const A* shift;   // z = (x - near) * scale + shift
    const A* offset;  // dx = g * scale + w * (offset + (x - near) * slope)
    const A* slope;

    Coefficients from(std::int64_t c) const {
        return {near + c, scale + c, shift + c, offset + c, slope + c};
    }
};

// One run of n values; what is not there is null. w: its weights (planar), or its one weight.
template <class T> struct Run {
    const T* x;
    const T* residual;
    const arithmetic<T>* w;
    const T* dy;
    T* out;        // y or dx
    T* dresidual;
};

struct Options {
    Activation activation;
    double parameter;
    bool through;
};

// Calls `step(i, count)` over n values: whole vectors with count = 0, then what is left.
template <class A, class F> inline void sweep(std::int64_t n, F step) {
    constexpr int lanes = Vector<A>::lanes;
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) step(i, 0);
    if (i < n) step(i, static_cast<int>(n - i));
}

template <class T> inline values<arithmetic<T>> read(const T* from, std::int64_t i, int count) {
    return count ? load(from + i, count) : load(from + i);
}
template <class N> inline auto read(const N& numbers, std::int64_t i, int count) -> decltype(numbers.at(i)) {
    return count ? numbers.at(i, count) : numbers.at(i);
}
template <class T, bool Streamed>
inline void write(T* to, std::int64_t i, int count, values<arithmetic<T>> v) {
    if (count) return store(to + i, v, count);
    if constexpr (Streamed) stream(to + i, v);
    else store(to + i, v);
}

// x, with 0 for what has weight 0 and is not finite.
template <class A> inline values<A> present(values<A> x, values<A> w, integers<A>* absent) {
    *absent = (w == 0) & not_finite<A>(x);
    return *absent ? values<A>{} : x;
}

// y = activation((x - near) * scale + shift + residual)
template <class T, Variant V, bool Planar, bool Streamed>
inline void normalize_run(const Run<T> run, const Coefficients<arithmetic<T>>& k, std::int64_t n,
                          const Options options) {
    using A = arithmetic<T>;
    const Numbers<A, !Planar> near(k.near), scale(k.scale), shift(k.shift);
    sweep<A>(n, [&](std::int64_t i, int count) BN_INLINE {
        auto x = read(run.x, i, count);
        if constexpr (V == Variant::general) {
            if (run.w) {
                integers<A> absent;
                x = present<A>(x, Planar ? read(run.w, i, count) : splat(*run.w), &absent);
            }
        }
        auto z = (x - read(near, i, count)) * read(scale, i, count) + read(shift, i, count);
        if constexpr (V == Variant::none_residual || V == Variant::relu_residual)
            z += read(run.residual, i, count);
        if constexpr (V == Variant::relu || V == Variant::relu_residual)
            z = z < 0 ? values<A>{} : z;
        if constexpr (V == Variant::general) {
            if (run.residual) z += read(run.residual, i, count);
            z = activate<A>(z, options.activation, static_cast<A>(options.parameter));
        }
        write<T, Streamed>(run.out, i, count, z);
    });
}

// The gradient by z, at values i ...; `distance` becomes x - near.
template <class T, Variant V, bool Planar> struct Upstream {
    using A = arithmetic<T>;
    const Run<T> run;  // copies, which no store of a result can change
    const Options options;
    const Numbers<A, !Planar> near, scale, shift;

    Upstream(const Run<T>& run, const Coefficients<A>& k, const Options& options)
        : run(run), options(options), near(k.near), scale(k.scale), shift(k.shift) {}

    values<A> weight(std::int64_t i, int count) const {
        return Planar ? read(run.w, i, count) : splat(*run.w);
    }

    BN_INLINE values<A> at(std::int64_t i, int count, values<A>* distance, integers<A>* absent) const {
        auto x = read(run.x, i, count);
        auto g = read(run.dy, i, count);
        if constexpr (V == Variant::general)
            if (run.w) x = present<A>(x, weight(i, count), absent);
        *distance = x - read(near, i, count);
        if constexpr (V != Variant::none) {
            auto z = *distance * read(scale, i, count) + read(shift, i, count);
            if constexpr (V == Variant::relu_residual) z += read(run.residual, i, count);
            if constexpr (V == Variant::general) {
                if (run.residual) z += read(run.residual, i, count);
                g = differentiate<A>(g, z, options.activation, static_cast<A>(options.parameter));
            } else {
                g = z > 0 ? g : values<A>{};
            }
        }
        return g;
    }
};

// dx = g * scale + w * (offset + (x - near) * slope), and dresidual = g where it is wanted
template <class T, Variant V, bool Planar, bool Streamed>
inline void apply_run(const Run<T>& run, const Coefficients<arithmetic<T>>& k, std::int64_t n,
                      const Options& options) {
    using A = arithmetic<T>;
    const Upstream<T, V, Planar> upstream(run, k, options);
    T* const out = run.out;
    T* const dresidual = run.dresidual;
    const bool through = options.through;
    const Numbers<A, !Planar> offset(k.offset), slope(k.slope);
    sweep<A>(n, [&](std::int64_t i, int count) BN_INLINE {
        values<A> distance;
        integers<A> absent{};
        const auto g = upstream.at(i, count, &distance, &absent);
        auto dx = g * read(upstream.scale, i, count);
        if (through) {
            auto back = distance * read(slope, i, count) + read(offset, i, count);
            if constexpr (V == Variant::general)
                if (upstream.run.w) {
                    const auto w = upstream.weight(i, count);
                    back = w == 0 ? values<A>{} : back * w;
                }
            dx += back;
        }
        if constexpr (V == Variant::general) dx = absent ? values<A>{} : dx;
        write<T, Streamed>(out, i, count, dx);
        if constexpr (V == Variant::relu_residual || V == Variant::general)
            if (dresidual) write<T, false>(dresidual, i, count, g);
    });
}

// What is summed for the moments: w * (x - near), and w * (x - near)^2.
template <class T, bool Planar, bool Masked> struct Spread {
    using A = arithmetic<T>;
    const Run<T> run;
    const Numbers<A, !Planar> near;

    Spread(const Run<T>& run, const Coefficients<A>& k, const Options&) : run(run), near(k.near) {}

    BN_INLINE void at(std::int64_t i, int count, values<A>* first, values<A>* second) const {
        auto x = read(run.x, i, count);
        if constexpr (Masked) {
            const auto w = Planar ? read(run.w, i, count) : splat(*run.w);
            integers<A> absent;
            x = present<A>(x, w, &absent);
            // not 0 * (x - near)^2, which is NaN where the square of some padding overflows
            const auto distance = w == 0 ? values<A>{} : x - read(near, i, count);
            *first = w * distance;
            *second = w * distance * distance;
        } else {
            *first = x - read(near, i, count);
            *second = *first * *first;
        }
    }
};

// What is summed for the gradients: g, and g * (x - near).
template <class T, Variant V, bool Planar> struct Products {
    using A = arithmetic<T>;
    const Upstream<T, V, Planar> upstream;

    Products(const Run<T>& run, const Coefficients<A>& k, const Options& options)
        : upstream(run, k, options) {}

    BN_INLINE void at(std::int64_t i, int count, values<A>* first, values<A>* second) const {
        values<A> distance;
        integers<A> absent{};
        *first = upstream.at(i, count, &distance, &absent);
        *second = *first * distance;
    }
};

// Adds the two sums of a run of one channel to `sums`, a vector each.
template <class A, class Terms>
inline void sum_run(const Terms& terms, std::int64_t n, values<A>* sums) {
    constexpr int lanes = Vector<A>::lanes, unroll = 4;
    values<A> first[unroll] = {}, second[unroll] = {}, p, q;
    std::int64_t i = 0;
    for (; i + unroll * lanes <= n; i += unroll * lanes) {
#pragma GCC unroll 4
        for (int u = 0; u < unroll; ++u) {
            terms.at(i + u * lanes, 0, &p, &q);
            first[u] += p;
            second[u] += q;
        }
    }
    for (; i + lanes <= n; i += lanes) {
        terms.at(i, 0, &p, &q);
        first[0] += p;
        second[0] += q;
    }
    if (i < n) {
        const auto inside = iota<A>() < static_cast<int>(n - i);
        terms.at(i, static_cast<int>(n - i), &p, &q);
        first[1] += inside ? p : values<A>{};
        second[1] += inside ? q : values<A>{};
    }
    sums[0] += (first[0] + first[1]) + (first[2] + first[3]);
    sums[1] += (second[0] + second[1]) + (second[2] + second[3]);
}

// Adds rows of a run a position to the sums of each channel: first (n), second (n).
template <class A, class Terms, int Rows>
inline void sum_rows(const Terms (&terms)[Rows], std::int64_t n, A* first, A* second) {
    sweep<A>(n, [&](std::int64_t i, int count) BN_INLINE {
        values<A> p[Rows], q[Rows];
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) terms[r].at(i, count, &p[r], &q[r]);
        if constexpr (Rows == 4) {
            p[0] = (p[0] + p[1]) + (p[2] + p[3]);
            q[0] = (q[0] + q[1]) + (q[2] + q[3]);
        }
        write<A, false>(first, i, count, read(first, i, count) + p[0]);
        write<A, false>(second, i, count, read(second, i, count) + q[0]);
    });
}

}  // namespace BN_ISA
