// The four steps on one chunk of one group of channels, for both layouts.
#pragma once

#include <cstdlib>

#include "geometry.h"
#include "runs.h"

namespace BN_ISA {

using batchnorm::Backward;
using batchnorm::Call;
using batchnorm::Forward;
using batchnorm::Tensor;

// Memory of a call, aligned to registers and freed with it.
template <class A> class Array {
public:
    explicit Array(int64_t size)
        : data_(static_cast<A*>(std::aligned_alloc(64, (size * sizeof(A) + 127) / 64 * 64))) {}
    ~Array() { std::free(data_); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    A* get() const { return data_; }
    A& operator[](int64_t i) const { return data_[i]; }

private:
    A* data_;
};

// What a thread needs for the sums of one group.
template <class A> struct Scratch {
    Array<A> near, first, second;
    Array<values<A>> sums;
    explicit Scratch(int64_t group) : near(group), first(group), second(group), sums(2 * group) {}
};

// The tensors of a call as pointers of their type, with the steps of the folded geometry.
template <class T> struct Operands {
    using A = arithmetic<T>;
    const Geometry& geometry;
    Tensor x, residual, dy, out, dresidual;
    const A* mask;

    template <class P> P* at(const Tensor& t, int64_t n, int64_t c, int64_t s) const {
        if (!t.data) return nullptr;
        return static_cast<P*>(t.data) + n * geometry.fold * t.outer +
               (geometry.planar ? c * t.inner + s : c);
    }

    Run<T> run(int64_t n, int64_t c, int64_t s) const {
        const A* w = mask ? mask + (geometry.planar ? n * geometry.S + s : n) : nullptr;
        return {at<const T>(x, n, c, s), at<const T>(residual, n, c, s), w,
                at<const T>(dy, n, c, s), at<T>(out, n, c, s), at<T>(dresidual, n, c, s)};
    }
};

// A value for each position: does `run(operands of the run, coefficients, n, options)`.
template <class T, class F>
inline void each_run(const Operands<T>& operands, const Span& span,
                     const Coefficients<arithmetic<T>>& k, F function) {
    for (int64_t n = span.n0; n < span.n1; ++n) {
        if (!operands.geometry.planar) {
            function(operands.run(n, span.c0, 0), k.from(span.c0), span.c1 - span.c0);
            continue;
        }
        for (int64_t c = span.c0; c < span.c1; ++c)
            function(operands.run(n, c, span.s0), k.from(c), span.s1 - span.s0);
    }
}

template <class T> inline bool aligned(const T* to) {
    return reinterpret_cast<std::uintptr_t>(to) % sizeof(typename Stored<T>::type) == 0;
}

// Elementwise: `Step::plain` or, where the output can go past the caches, `Step::streamed`.
template <class T, bool Planar, class Step>
inline void write_span(const Operands<T>& operands, const Span& span,
                       const Coefficients<arithmetic<T>>& k, const Options& options, bool past) {
    each_run<T>(operands, span, k, [&](Run<T> run, const auto& own, int64_t n) {
        if (!past) return Step::template run<false>(run, own, n, options);
        if (aligned(run.out)) return Step::template run<true>(run, own, n, options);
        if constexpr (!Planar) return Step::template run<false>(run, own, n, options);
        const int64_t size = sizeof(typename Stored<T>::type);
        const int64_t off = reinterpret_cast<std::uintptr_t>(run.out) % size;
        const int64_t head = least(n, (size - off) / static_cast<int64_t>(sizeof(T)));
        Step::template run<false>(run, own, head, options);
        run.x += head, run.out += head;
        if (run.residual) run.residual += head;
        if (run.w) run.w += head;
        if (run.dy) run.dy += head;
        if (run.dresidual) run.dresidual += head;
        Step::template run<true>(run, own, n - head, options);
    });
}

template <class T, Variant V, bool Planar> struct Normalize {
    template <bool Streamed>
    static void run(const Run<T>& run, const Coefficients<arithmetic<T>>& k, int64_t n, const Options& o) {
        normalize_run<T, V, Planar, Streamed>(run, k, n, o);
    }
};
template <class T, Variant V, bool Planar> struct Apply {
    template <bool Streamed>
    static void run(const Run<T>& run, const Coefficients<arithmetic<T>>& k, int64_t n, const Options& o) {
        apply_run<T, V, Planar, Streamed>(run, k, n, o);
    }
};

// Sums over a span of at most one block: for channel c, totals(c, first, second) once, as double.
template <class T, bool Planar, class Terms, class F>
inline void sum_block(const Operands<T>& operands, const Span& span,
                      const Coefficients<arithmetic<T>>& k, const Options& options,
                      Scratch<arithmetic<T>>& scratch, F totals) {
    using A = arithmetic<T>;
    const int64_t channels = span.c1 - span.c0;
    if constexpr (Planar) {
        for (int64_t c = 0; c < 2 * channels; ++c) scratch.sums[c] = values<A>{};
        for (int64_t n = span.n0; n < span.n1; ++n)
            for (int64_t c = 0; c < channels; ++c) {
                const Run<T> run = operands.run(n, span.c0 + c, span.s0);
                const Terms terms(run, k.from(c), options);
                sum_run<A>(terms, span.s1 - span.s0, &scratch.sums[2 * c]);
            }
        for (int64_t c = 0; c < channels; ++c)
            totals(c, sum<A>(scratch.sums[2 * c]), sum<A>(scratch.sums[2 * c + 1]));
    } else {
        constexpr int Rows = 4;
        for (int64_t c = 0; c < channels; ++c) scratch.first[c] = scratch.second[c] = 0;
        int64_t n = span.n0;
        for (; n + Rows <= span.n1; n += Rows) {
            const Run<T> runs[Rows] = {operands.run(n, span.c0, 0), operands.run(n + 1, span.c0, 0),
                                       operands.run(n + 2, span.c0, 0), operands.run(n + 3, span.c0, 0)};
            const Terms terms[Rows] = {{runs[0], k, options}, {runs[1], k, options},
                                       {runs[2], k, options}, {runs[3], k, options}};
            sum_rows<A>(terms, channels, scratch.first.get(), scratch.second.get());
        }
        for (; n < span.n1; ++n) {
            const Run<T> run = operands.run(n, span.c0, 0);
            const Terms terms[1] = {{run, k, options}};
            sum_rows<A>(terms, channels, scratch.first.get(), scratch.second.get());
        }
        for (int64_t c = 0; c < channels; ++c) totals(c, scratch.first[c], scratch.second[c]);
    }
}

// Calls `function(block)` for the blocks of a span, in order.
template <bool Planar, class F> inline void each_block(const Span& span, F function) {
    const int64_t length = Planar ? least(span.s1 - span.s0, Geometry::block) : 1;
    const int64_t rows = Planar ? most(1, Geometry::block / most(length, 1)) : Geometry::block_rows;
    for (int64_t n = span.n0; n < span.n1; n += rows)
        for (int64_t s = span.s0; s < span.s1; s += length)
            function(Span{span.c0, span.c1, n, least(span.n1, n + rows), s, least(span.s1, s + length)});
}

// Chan's update: adds the moments of `more` values to those of `count`.
inline void merge(double* count, double* mean, double* m2, double more, double own, double spread) {
    const double total = *count + more, delta = own - *mean;
    *mean += delta * (more / total);
    *m2 += spread + delta * delta * (*count * (more / total));
    *count = total;
}

// How many values a channel has in a span, or their weight.
template <class T> inline double count_span(const Operands<T>& operands, const Span& span) {
    if (!operands.mask) return static_cast<double>(span.positions());
    const int64_t step = operands.geometry.planar ? operands.geometry.S : 1;
    double count = 0;
    for (int64_t n = span.n0; n < span.n1; ++n)
        for (int64_t s = span.s0; s < span.s1; ++s)
            count += static_cast<double>(operands.mask[n * step + s]);
    return count;
}

// The moments of each channel of a span. The values of a block are summed around a mean of some of
// them: the block's first ones, or all where there are weights. An infinity makes m2 NaN, as it must.
template <class T, bool Planar, bool Masked>
void collect_span(const Operands<T>& operands, const Span& span, Scratch<arithmetic<T>>& scratch,
                    double* mean, double* m2) {
    using A = arithmetic<T>;
    using Terms = Spread<T, Planar, Masked>;
    const Options none{};
    const A* near = scratch.near.get();
    const Coefficients<A> k{near, near, near, near, near};
    double count = 0;
    for (int64_t c = 0; c < span.c1 - span.c0; ++c) mean[c] = m2[c] = 0;
    each_block<Planar>(span, [&](const Span& block) {
        Span some = block;
        const double size = count_span(operands, block);
        if (size == 0) return;
        if (Masked) {
            // all of them
        } else if (Planar) {
            some.s1 = least(block.s1, block.s0 + 256);
            some.n1 = least(block.n1, block.n0 + ceil_divide(64, some.s1 - some.s0));
        } else {
            some.n1 = least(block.n1, block.n0 + 16);
        }
        const A share = static_cast<A>(1 / (Masked ? size : static_cast<double>(some.positions())));
        for (int64_t c = 0; c < block.c1 - block.c0; ++c) scratch.near[c] = 0;
        sum_block<T, Planar, Terms>(operands, some, k, none, scratch, [&](int64_t c, A first, A) {
            const A near = first * share;
            scratch.near[c] = near - near == 0 ? near : 0;  // infinities go into the sums
        });
        sum_block<T, Planar, Terms>(operands, block, k, none, scratch, [&](int64_t c, A first, A second) {
            const double own = first / size, spread = second - first * own;
            double before = count;
            merge(&before, &mean[c], &m2[c], size, scratch.near[c] + own, spread < 0 ? 0 : spread);
        });
        count += size;
    });
}

// sum g and sum g * (x - near) of each channel of a span.
template <class T, Variant V, bool Planar>
void reduce_span(const Operands<T>& operands, const Span& span, const Coefficients<arithmetic<T>>& k,
                 const Options& options, Scratch<arithmetic<T>>& scratch, double* sum_g, double* sum_gd) {
    using A = arithmetic<T>;
    for (int64_t c = 0; c < span.c1 - span.c0; ++c) sum_g[c] = sum_gd[c] = 0;
    each_block<Planar>(span, [&](const Span& block) {
        sum_block<T, Planar, Products<T, V, Planar>>(
            operands, block, k.from(span.c0), options, scratch, [&](int64_t c, A first, A second) {
                sum_g[c] += first;
                sum_gd[c] += second;
            });
    });
}

}  // namespace BN_ISA
