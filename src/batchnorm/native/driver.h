// The order of the work: which chunk when, by which thread, and what stands between the passes.
//
// Where a group of channels fits in the cache, a thread does all of it at once, so that memory is
// read once. Otherwise all groups are summed first, and written second, in reverse, so that what is
// still in the cache is used. The partial sums are combined in one order whatever happened.
#pragma once

#include <cmath>
#include <deque>
#include <type_traits>

#include <omp.h>

#include "cache.h"
#include "chunks.h"

namespace BN_ISA {

using batchnorm::PerChannel;
using batchnorm::Type;

// Whether results go past the caches, as they do where a batch and its result take a quarter of the last
// one. What reads the result next then has to fetch it: benchmarks/streaming.py measures both together.
inline bool goes_past_cache(int64_t bytes) { return 8 * bytes >= batchnorm::cache_bytes(); }

// Calls f(c, number) for channels, in double.
template <class F> inline void widened(const PerChannel& numbers, int64_t c0, int64_t c1, double otherwise, F f) {
    if (!numbers.data) {
        for (int64_t c = c0; c < c1; ++c) f(c, otherwise);
    } else if (numbers.type == Type::float32) {
        for (int64_t c = c0; c < c1; ++c) f(c, static_cast<double>(static_cast<const float*>(numbers.data)[c]));
    } else if (numbers.type == Type::float64) {
        for (int64_t c = c0; c < c1; ++c) f(c, static_cast<const double*>(numbers.data)[c]);
    } else {
        for (int64_t c = c0; c < c1; ++c) f(c, numbers.get(c));
    }
}

// inverse_std = 1 / sqrt(m2 * share + eps), or 0 of no values. In a loop of its own, for the compiler
// to take many at a time: one after the other takes as long as 16 rows of a batch.
inline void set_inverse_std(const double* __restrict m2, int64_t n, double share, double eps, bool any,
                            double* __restrict inverse_std) {
    const double numerator = any;
    for (int64_t c = 0; c < n; ++c) inverse_std[c] = numerator / std::sqrt(m2[c] * share + eps);
}

template <class T> struct Driver {
    using A = arithmetic<T>;
    const Call& call;
    Operands<T> operands;
    const Geometry& geometry;
    Options options;
    int threads;
    bool past;
    int64_t pitch;           // from one of the five to the next
    Array<A> memory;
    A *near, *scale, *shift, *offset, *slope;  // (width): the numbers of the channels, once a fold
    Coefficients<A> k;

    Driver(const Call& call, const Operands<T>& operands, bool through)
        : call(call), operands(operands), geometry(operands.geometry),
          options{call.activation, call.parameter, through},
          past(goes_past_cache(call.values * sizeof(T))),
          pitch(ceil_divide(geometry.width, 16) * 16), memory(5 * pitch), near(memory.get()),
          scale(near + pitch), shift(scale + pitch), offset(shift + pitch), slope(offset + pitch),
          k{near, scale, shift, offset, slope} {
        const int64_t grain = 1 << 14;
        const int64_t useful = least(geometry.groups * geometry.chunks, call.N * call.C * call.S / grain);
        threads = static_cast<int>(most(1, least(call.threads, useful)));
    }

    // What normalizes channels. The mean is two floats: what `near` lacks goes into the shift.
    void set_channels(int64_t c0, int64_t c1) const {
        widened(call.weight, c0, c1, 1, [&](int64_t c, double weight) {
            scale[c] = quiet(static_cast<A>(call.inverse_std[c] * weight));
        });
        widened(call.bias, c0, c1, 0, [&](int64_t c, double bias) {
            near[c] = quiet(static_cast<A>(call.mean[c]));
            shift[c] = static_cast<A>(bias);
        });
        widened(call.weight, c0, c1, 1, [&](int64_t c, double weight) {
            const double rest = call.mean[c] - near[c];
            shift[c] = quiet(static_cast<A>(shift[c] - rest * (call.inverse_std[c] * weight)));
        });
        unfold(c0, c1, near, scale, shift);
    }

    // dx = scale * (g - w * (mean_g + xhat * mean_gx)), as g * scale + w * (offset + distance * slope)
    void set_through(int64_t c0, int64_t c1, const double* sum_g, const double* sum_g_xhat, double count,
                     double degrees) const {
        const double share = count > 0 ? 1 / count : 0, other = degrees > 0 ? 1 / degrees : 0;
        widened(call.weight, c0, c1, 1, [&](int64_t c, double weight) {
            const double own = call.inverse_std[c] * weight;
            const double rest = call.mean[c] - static_cast<A>(call.mean[c]);
            const double steep = own * (sum_g_xhat[c] * other) * call.inverse_std[c];
            slope[c] = quiet(static_cast<A>(-steep));
            offset[c] = quiet(static_cast<A>(steep * rest - own * (sum_g[c] * share)));
        });
        unfold(c0, c1, slope, offset);
    }

    // Calls f(k, i) for each chunk k, and each place i in its `width` numbers, that hold channel 0.
    template <class F> void each_part(F f) const {
        for (int64_t k = 0; k < geometry.chunks; ++k)
            for (int64_t i = 0; i < geometry.chunk_width(k); i += call.C) f(k, i);
    }

    // Runs the passes: sum(span, k, scratch), then ready(c0, c1) for channels, then put(span).
    template <class Sum, class Ready, class Put>
    void passes(bool sums, bool puts, int64_t bytes_a_value, Sum sum, Ready ready, Put put) const {
        const int64_t groups = geometry.groups, chunks = geometry.chunks;
        const int64_t own = bytes_a_value * geometry.group * call.N * call.S / geometry.fold;
        const bool even = ceil_divide(groups, threads) * threads * 4 <= groups * 5;
        // a group's part of wide rows is on other pages in each row, and only so many are at hand
        const int64_t row_bytes = bytes_a_value * call.x.outer;
        const bool scattered = !geometry.planar && groups > 1 && row_bytes >= 4096 && call.N > 256;
        const bool at_once = sums && puts && even && !scattered &&
                             own <= batchnorm::cache_bytes() / (2 * threads * call.beside);
        std::deque<Scratch<A>> scratches;  // made here: what fails in a team cannot be caught outside
        for (int t = 0; t < threads; ++t) scratches.emplace_back(geometry.group);
        const auto work = [&](int64_t me, int64_t team) {
            Scratch<A>& scratch = scratches[me];
            // each thread has its part of the tasks, and nothing here binds to a team further out
            const auto mine = [&](int64_t tasks, auto f) {
                for (int64_t t = part(tasks, me, team); t < part(tasks, me + 1, team); ++t) f(t);
            };
            const auto wait_for_all = [&] {
                if (team == 1) return;
#pragma omp barrier
            };
            if (at_once) {
                mine(groups, [&](int64_t g) {
                    if (sums)
                        for (int64_t k = 0; k < chunks; ++k) sum(geometry.span(g, k), k, scratch);
                    const int64_t c0 = g * geometry.group;
                    ready(c0, least(call.C, c0 + geometry.group));
                    if (puts)
                        for (int64_t k = chunks; k-- > 0;) put(geometry.span(g, k));
                });
            } else {
                const int64_t tasks = groups * chunks;
                if (sums) {
                    mine(tasks, [&](int64_t t) { sum(geometry.span(t % groups, t / groups), t / groups, scratch); });
                    wait_for_all();
                }
                constexpr int64_t some = 64;
                mine(ceil_divide(call.C, some),
                     [&](int64_t t) { ready(t * some, least(call.C, (t + 1) * some)); });
                wait_for_all();
                if (puts) {
                    // each thread has the part that it summed, and goes through it backwards
                    const int64_t begin = part(tasks, me, team), end = part(tasks, me + 1, team);
                    for (int64_t t = end; t-- > begin;) put(geometry.span(t % groups, t / groups));
                }
            }
            if (past) fence();
        };
        if (threads == 1) return work(0, 1);  // a small batch, for which even a team of one takes long
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
    }

private:
    // Numbers of channels that few-channelled rows have several times.
    template <class... Arrays> void unfold(int64_t c0, int64_t c1, Arrays... arrays) const {
        for (int64_t i = call.C; i < geometry.width; i += call.C)
            for (int64_t c = c0; c < c1; ++c) ((arrays[i + c] = arrays[c]), ...);
    }

    // Where the part of a thread begins: the first ones have one more.
    static int64_t part(int64_t tasks, int64_t me, int64_t team) {
        return me * (tasks / team) + least(me, tasks % team);
    }
};

// Which variant a call takes.
inline Variant variant_of(const Call& call, bool backward) {
    const bool relu = call.activation == Activation::relu, residual = call.residual.data;
    if (!is_piecewise(call.activation)) return Variant::smooth;
    if (!call.mask && !residual && call.activation == Activation::relu6) return Variant::relu6;
    if (call.mask || !(relu || call.activation == Activation::none)) return Variant::piecewise;
    if (relu) return residual ? Variant::relu_residual : Variant::relu;
    return residual && !backward ? Variant::none_residual : Variant::none;
}

// Calls f with the variant as a constant.
template <class F> inline void with_variant(Variant variant, F f) {
    switch (variant) {
        case Variant::none: return f(std::integral_constant<Variant, Variant::none>{});
        case Variant::relu: return f(std::integral_constant<Variant, Variant::relu>{});
        case Variant::relu6: return f(std::integral_constant<Variant, Variant::relu6>{});
        case Variant::none_residual: return f(std::integral_constant<Variant, Variant::none_residual>{});
        case Variant::relu_residual: return f(std::integral_constant<Variant, Variant::relu_residual>{});
        case Variant::piecewise: return f(std::integral_constant<Variant, Variant::piecewise>{});
        case Variant::smooth: return f(std::integral_constant<Variant, Variant::smooth>{});
    }
}

// Whether all tensors of a call have their rows one after the other.
inline bool dense_rows(const Call& call, const Tensor* others, int count) {
    bool dense = !call.mask && call.x.outer == call.C;
    if (call.residual.data) dense = dense && call.residual.outer == call.C;
    for (int i = 0; i < count; ++i)
        if (others[i].data) dense = dense && others[i].outer == call.C;
    return dense;
}

template <class T, bool Planar> void forward(const Forward& call) {
    using A = arithmetic<T>;
    const Geometry geometry(Planar, call.N, call.C, call.S, dense_rows(call, &call.y, 1));
    const Operands<T> operands{geometry, call.x, call.residual, {}, call.y, {},
                               static_cast<const A*>(call.mask)};
    const Driver<T> driver(call, operands, false);
    // the moments of one chunk of all channels are those of the batch
    const bool direct = geometry.chunks == 1 && geometry.fold == 1;
    const int64_t kept = call.collect && !direct ? geometry.chunks : 0;
    const Array<double> means(kept * geometry.width), m2s(kept * geometry.width), counts(kept);
    double weights = 0;  // a wide row counts once in each of its channels
    for (int64_t k = 0; k < kept; ++k) weights += counts[k] = count_span(operands, geometry.span(0, k));
    if (call.collect && direct) weights = count_span(operands, geometry.span(0, 0));
    const double positions = static_cast<double>(call.N) * static_cast<double>(call.S);
    if (call.collect) *call.count = call.mask ? weights : positions;
    const auto sum = [&](const Span& span, int64_t k, Scratch<A>& scratch) {
        double* mean = (direct ? call.mean : means.get() + k * geometry.width) + span.c0;
        double* m2 = (direct ? call.m2 : m2s.get() + k * geometry.width) + span.c0;
        if (call.mask) collect_span<T, Planar, true>(operands, span, scratch, mean, m2);
        else collect_span<T, Planar, false>(operands, span, scratch, mean, m2);
    };
    const auto ready = [&](int64_t c0, int64_t c1) {
        if (call.collect) {
            double seen = direct ? *call.count : 0;
            for (int64_t c = c0; c < c1 && !direct; ++c) call.mean[c] = call.m2[c] = 0;
            if (!direct) driver.each_part([&](int64_t k, int64_t i) {
                if (counts[k] == 0) return;
                const double share = counts[k] / (seen + counts[k]);
                const double *const mean = &means[k * geometry.width + i], *const m2 = &m2s[k * geometry.width + i];
                for (int64_t c = c0; c < c1; ++c) merge(seen, &call.mean[c], &call.m2[c], share, mean[c], m2[c]);
                seen += counts[k];
            });
            const double degrees = seen - call.correction, share = degrees > 0 ? 1 / degrees : 0;
            set_inverse_std(call.m2 + c0, c1 - c0, share, call.eps, seen > 0, call.inverse_std + c0);
        } else if (call.running_mean.data) {
            widened(call.running_mean, c0, c1, 0, [&](int64_t c, double mean) { call.mean[c] = mean; });
            widened(call.running_var, c0, c1, 1, [&](int64_t c, double var) {
                call.inverse_std[c] = 1 / std::sqrt(var + call.eps);
            });
        }
        if (call.y.data) driver.set_channels(c0, c1);
    };
    with_variant(variant_of(call, false), [&](auto variant) {
        driver.passes(call.collect, call.y.data, sizeof(T), sum, ready, [&](const Span& span) {
            write_span<Planar>(Normalize<T, variant, Planar>{driver.options}, operands, span, driver.k,
                               driver.past);
        });
    });
}

template <class T, bool Planar> void backward(const Backward& call) {
    using A = arithmetic<T>;
    const Tensor others[] = {call.dy, call.dx, call.dresidual};
    const Geometry geometry(Planar, call.N, call.C, call.S, dense_rows(call, others, 3));
    const Operands<T> operands{geometry, call.x, call.residual, call.dy, call.dx, call.dresidual,
                               static_cast<const A*>(call.mask)};
    const Driver<T> driver(call, operands, call.through);
    driver.set_channels(0, call.C);
    const int64_t kept = call.reduce ? geometry.chunks : 0;
    const Array<double> sums_g(kept * geometry.width), sums_gd(kept * geometry.width);
    const auto ready = [&](int64_t c0, int64_t c1) {
        double *const sum_g = call.sum_g, *const sum_g_xhat = call.sum_g_xhat;
        if (call.reduce) {
            for (int64_t c = c0; c < c1; ++c) sum_g[c] = sum_g_xhat[c] = 0;
            driver.each_part([&](int64_t k, int64_t i) {
                const double *const g = &sums_g[k * geometry.width + i], *const gd = &sums_gd[k * geometry.width + i];
                for (int64_t c = c0; c < c1; ++c) {
                    sum_g[c] += g[c];
                    sum_g_xhat[c] += gd[c];
                }
            });
            for (int64_t c = c0; c < c1; ++c) {
                const double rest = call.mean[c] - static_cast<A>(call.mean[c]);
                sum_g_xhat[c] = (sum_g_xhat[c] - rest * sum_g[c]) * call.inverse_std[c];
            }
        }
        if (call.through) driver.set_through(c0, c1, sum_g, sum_g_xhat, *call.count, *call.count - call.correction);
    };
    const int64_t bytes = sizeof(T) * (call.residual.data ? 3 : 2);
    with_variant(variant_of(call, true), [&](auto variant) {
        constexpr Variant V = variant == Variant::none_residual ? Variant::none : variant;
        const auto sum = [&](const Span& span, int64_t k, Scratch<A>& scratch) {
            double* sum_g = sums_g.get() + k * geometry.width + span.c0;
            double* sum_gd = sums_gd.get() + k * geometry.width + span.c0;
            reduce_span<T, V, Planar>(operands, span, driver.k, driver.options, scratch, sum_g, sum_gd);
        };
        driver.passes(call.reduce, call.dx.data, bytes, sum, ready, [&](const Span& span) {
            write_span<Planar>(Apply<T, V, Planar>{driver.options}, operands, span, driver.k, driver.past);
        });
    });
}

}  // namespace BN_ISA
