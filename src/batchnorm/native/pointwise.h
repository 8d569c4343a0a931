// What happens to one vector of values in each of the four steps, whatever loop it stands in.
#pragma once

#include "activations.h"

namespace BN_ISA {

// The numbers of the channels that a vector of values belongs to.
template <class A> struct Channel {
    values<A> near;    // the mean, rounded
    values<A> scale;   // weight * inverse_std
    values<A> shift;   // z = (x - near) * scale + shift
    values<A> offset;  // dx = g * scale + w * (offset + (x - near) * slope)
    values<A> slope;
};

// The same place in every tensor of a call; what is not there is null. Where runs are of one channel
// each value has its weight w, and where they are of one position all have the same.
template <class T> struct Place {
    const T* x;
    const T* residual;
    const arithmetic<T>* w;
    const T* dy;
    T* out;  // y or dx
    T* dresidual;
};

// How far it is to the next place, in elements; 0 for what is not there.
struct Steps {
    int64_t x, residual, w, dy, out, dresidual;
};

template <class T> BN_INLINE Place<T> moved(const Place<T>& p, const Steps& by, int64_t times) {
    return {p.x + times * by.x,   p.residual + times * by.residual, p.w + times * by.w,
            p.dy + times * by.dy, p.out + times * by.out,           p.dresidual + times * by.dresidual};
}

struct Options {
    Activation activation;
    double parameter;
    bool through;
};

// How many vectors of a row are gone down together: four lines of memory, at the widest. Fewer with a
// smooth activation, for each of them, and in sums each of four rows of them, has a copy of its code.
template <class T, Variant V = Variant::none>
constexpr int strip_of = V == Variant::smooth ? 4 : 4 * sizeof(arithmetic<T>) / sizeof(T);

// Whole vectors, or the first `count` lanes.
template <bool Whole, class T> BN_INLINE values<arithmetic<T>> read(const T* from, int count) {
    if constexpr (Whole) return load(from);
    else return load(from, count);
}

template <bool Whole, bool Streamed, class T>
BN_INLINE void write(T* to, values<arithmetic<T>> v, int count) {
    if constexpr (!Whole) store(to, v, count);
    else if constexpr (Streamed) stream(to, v);
    else store(to, v);
}

template <class T, bool Planar, bool Whole>
BN_INLINE values<arithmetic<T>> weights(const Place<T>& p, int64_t i, int count) {
    if constexpr (Planar) return read<Whole>(p.w + i, count);
    else return splat(*p.w);
}

// x, with 0 for what has weight 0 and is not finite.
template <class A> BN_INLINE values<A> present(values<A> x, values<A> w, integers<A>* absent) {
    *absent = (w == 0) & not_finite<A>(x);
    return *absent ? values<A>{} : x;
}

// x - near, where padding is read as 0.
template <class T, Variant V, bool Planar, bool Whole>
BN_INLINE values<arithmetic<T>> distance_at(const Place<T>& p, int64_t i, int count,
                                            const Channel<arithmetic<T>>& k,
                                            integers<arithmetic<T>>* absent) {
    auto x = read<Whole>(p.x + i, count);
    if constexpr (has_choices(V))
        if (p.w) x = present<arithmetic<T>>(x, weights<T, Planar, Whole>(p, i, count), absent);
    return x - k.near;
}

// z, the input of the activation.
template <class T, Variant V, bool Whole>
BN_INLINE values<arithmetic<T>> preactivation(const Place<T>& p, int64_t i, int count,
                                              const Channel<arithmetic<T>>& k,
                                              values<arithmetic<T>> distance) {
    auto z = distance * k.scale + k.shift;
    if constexpr (V == Variant::none_residual || V == Variant::relu_residual)
        z += read<Whole>(p.residual + i, count);
    if constexpr (has_choices(V))
        if (p.residual) z += read<Whole>(p.residual + i, count);
    return z;
}

// y = activation((x - near) * scale + shift + residual)
template <class T, Variant V, bool Planar> struct Normalize {
    using Type = T;
    using A = arithmetic<T>;
    static constexpr int strip = strip_of<T, V>;
    Options options;

    template <bool Whole, bool Streamed>
    BN_INLINE void at(const Place<T>& p, int64_t i, int count, const Channel<A>& k) const {
        integers<A> absent;
        const auto distance = distance_at<T, V, Planar, Whole>(p, i, count, k, &absent);
        auto z = preactivation<T, V, Whole>(p, i, count, k, distance);
        z = activate<V>(z, options.activation, static_cast<A>(options.parameter));
        write<Whole, Streamed>(p.out + i, z, count);
    }
};

// The gradient by z; `distance` becomes x - near.
template <class T, Variant V, bool Planar, bool Whole>
BN_INLINE values<arithmetic<T>> upstream(const Place<T>& p, int64_t i, int count,
                                         const Channel<arithmetic<T>>& k, const Options& options,
                                         values<arithmetic<T>>* distance,
                                         integers<arithmetic<T>>* absent) {
    using A = arithmetic<T>;
    const auto g = read<Whole>(p.dy + i, count);
    *distance = distance_at<T, V, Planar, Whole>(p, i, count, k, absent);
    if constexpr (V == Variant::none) return g;
    const auto z = preactivation<T, V, Whole>(p, i, count, k, *distance);
    return differentiate<V>(g, z, options.activation, static_cast<A>(options.parameter));
}

// dx = g * scale + w * (offset + (x - near) * slope), and dresidual = g where it is wanted
template <class T, Variant V, bool Planar> struct Apply {
    using Type = T;
    using A = arithmetic<T>;
    static constexpr int strip = strip_of<T, V>;
    Options options;

    template <bool Whole, bool Streamed>
    BN_INLINE void at(const Place<T>& p, int64_t i, int count, const Channel<A>& k) const {
        values<A> distance;
        integers<A> absent{};
        const auto g = upstream<T, V, Planar, Whole>(p, i, count, k, options, &distance, &absent);
        auto dx = g * k.scale;
        if (options.through) {
            auto back = distance * k.slope + k.offset;
            if constexpr (has_choices(V))
                if (p.w) {
                    const auto w = weights<T, Planar, Whole>(p, i, count);
                    back = w == 0 ? values<A>{} : back * w;
                }
            dx += back;
        }
        if constexpr (has_choices(V)) dx = absent ? values<A>{} : dx;
        write<Whole, Streamed>(p.out + i, dx, count);
        if constexpr (V == Variant::relu_residual || has_choices(V))
            if (p.dresidual) write<Whole, Streamed>(p.dresidual + i, g, count);
    }
};

// What is summed for the moments: w * (x - near), and w * (x - near)^2.
template <class T, bool Planar, bool Masked> struct Spread {
    using Type = T;
    using A = arithmetic<T>;
    static constexpr int strip = strip_of<T>;

    template <bool Whole>
    BN_INLINE void at(const Place<T>& p, int64_t i, int count, const Channel<A>& k, values<A>* first,
                      values<A>* second) const {
        auto x = read<Whole>(p.x + i, count);
        if constexpr (Masked) {
            const auto w = weights<T, Planar, Whole>(p, i, count);
            integers<A> absent;
            x = present<A>(x, w, &absent);
            // not 0 * (x - near)^2, which is NaN where the square of some padding overflows
            const auto distance = w == 0 ? values<A>{} : x - k.near;
            *first = w * distance;
            *second = *first * distance;
        } else {
            *first = x - k.near;
            *second = *first * *first;
        }
    }
};

// What is summed for the gradients: g, and g * (x - near).
template <class T, Variant V, bool Planar> struct Products {
    using Type = T;
    using A = arithmetic<T>;
    static constexpr int strip = V == Variant::smooth ? 2 : strip_of<T, V>;
    Options options;

    template <bool Whole>
    BN_INLINE void at(const Place<T>& p, int64_t i, int count, const Channel<A>& k, values<A>* first,
                      values<A>* second) const {
        values<A> distance;
        integers<A> absent{};
        *first = upstream<T, V, Planar, Whole>(p, i, count, k, options, &distance, &absent);
        *second = *first * distance;
    }
};

}  // namespace BN_ISA
