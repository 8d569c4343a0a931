// The four steps on one chunk of one group of channels, for both layouts.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "geometry.h"
#include "loops.h"

namespace BN_ISA {

using batchnorm::Backward;
using batchnorm::Call;
using batchnorm::Forward;
using batchnorm::Tensor;

// What a thread has freed and may need again soon: a call takes about ten blocks of a few kilobytes, and
// one of many small groups takes that for each of them.
class Idle {
public:
    ~Idle() {
        for (const Block& block : blocks_) std::free(block.data);
    }
    void* take(std::size_t& bytes) {
        for (Block& block : blocks_) {
            if (block.bytes < bytes || block.bytes > 4 * bytes) continue;
            bytes = block.bytes;
            block.bytes = 0;
            return std::exchange(block.data, nullptr);
        }
        return std::aligned_alloc(64, bytes);
    }
    void give(void* data, std::size_t bytes) {
        for (Block& block : blocks_) {
            if (bytes > most || block.data) continue;
            block = {data, bytes};
            return;
        }
        std::free(data);
    }

private:
#if defined(__SANITIZE_ADDRESS__)  // it watches what is freed
    static constexpr std::size_t most = 0;
#else
    static constexpr std::size_t most = std::size_t{64} << 10;
#endif
    struct Block { void* data = nullptr; std::size_t bytes = 0; };
    Block blocks_[16];
};

inline Idle& idle() {
    thread_local Idle own;
    return own;
}

// Memory of a call, aligned to registers and given back with it.
template <class A> class Array {
public:
    explicit Array(int64_t size)
        : bytes_((size * sizeof(A) + 127) / 64 * 64), data_(static_cast<A*>(idle().take(bytes_))) {
        if (!data_) throw std::bad_alloc();
    }
    ~Array() { idle().give(data_, bytes_); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    A* get() const { return data_; }
    A& operator[](int64_t i) const { return data_[i]; }

private:
    std::size_t bytes_;
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

    Place<T> at(int64_t n, int64_t c, int64_t s) const {
        const int64_t weight = geometry.planar ? n * geometry.S + s : n;
        return {pointer<const T>(x, n, c, s),   pointer<const T>(residual, n, c, s),
                mask ? mask + weight : nullptr, pointer<const T>(dy, n, c, s),
                pointer<T>(out, n, c, s),       pointer<T>(dresidual, n, c, s)};
    }

    // From row to row, or from channel to channel of one position.
    Steps steps() const {
        return {step(x), step(residual), mask && !geometry.planar, step(dy), step(out), step(dresidual)};
    }

    // Whether rows are of whole lines, and can be written past the caches.
    bool rows_are_aligned() const {
        for (const Tensor* const t : {&out, &dresidual})
            if (t->data && (off_line(t->data) || step(*t) * static_cast<int64_t>(sizeof(T)) % line)) return false;
        return true;
    }

    static int64_t off_line(const void* to) {
        return static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(to) % line);
    }

private:
    template <class P> P* pointer(const Tensor& t, int64_t n, int64_t c, int64_t s) const {
        if (!t.data) return nullptr;
        return static_cast<P*>(t.data) + n * geometry.fold * t.outer +
               (geometry.planar ? c * t.inner + s : c);
    }

    int64_t step(const Tensor& t) const {
        return !t.data ? 0 : geometry.planar ? t.inner : geometry.fold * t.outer;
    }
};

// Copies past the caches what whole lines of `to` hold, and the rest through them.
template <class T> inline void copy_past(T* to, const T* from, int64_t n) {
    const int64_t off = Operands<T>::off_line(to);
    if (off % sizeof(T)) {  // no value begins where a line does
        std::memcpy(to, from, n * sizeof(T));
        return;
    }
    const int64_t head = least(n, off ? (line - off) / static_cast<int64_t>(sizeof(T)) : 0);
    std::memcpy(to, from, head * sizeof(T));
    to += head, from += head, n -= head;
    constexpr int64_t values_a_line = line / sizeof(T);
    for (; n >= values_a_line; n -= values_a_line, to += values_a_line, from += values_a_line)
#pragma GCC unroll 4
        for (int64_t at = 0; at < line; at += BN_BYTES) {  // as if they were floats
            const auto v = load(reinterpret_cast<const float*>(reinterpret_cast<const char*>(from) + at));
            stream(reinterpret_cast<float*>(reinterpret_cast<char*>(to) + at), v);
        }
    std::memcpy(to, from, n * sizeof(T));
}

// The runs of some channels at one position. Past the caches go whole lines, as far as there are any.
template <class Step>
inline void write_runs(const Step& step, Place<typename Step::Type> p, const Steps& by, int64_t length,
                       const Span& span, const Coefficients<typename Step::A>& numbers, bool past) {
    using T = typename Step::Type;
    for (int64_t c = span.c0; c < span.c1; ++c, p = moved(p, by, 1)) {
        const auto k = numbers.all_lanes(c);
        const int64_t off = Operands<T>::off_line(p.out);
        if (!past || off % sizeof(T) || (p.dresidual && Operands<T>::off_line(p.dresidual) != off)) {
            write_run<false>(step, p, length, k);
            continue;
        }
        const int64_t head = least(length, off ? (line - off) / static_cast<int64_t>(sizeof(T)) : 0);
        if (head) write_run<false>(step, p, head, k);
        const Steps one{1, p.residual ? 1 : 0, p.w ? 1 : 0, p.dy ? 1 : 0, 1, p.dresidual ? 1 : 0};
        write_run<true>(step, moved(p, one, head), length - head, k);
    }
}

// A result for each value; `past`: the results go past the caches.
template <bool Planar, class Step>
inline void write_span(const Step& step, const Operands<typename Step::Type>& operands, const Span& span,
                       const Coefficients<typename Step::A>& numbers, bool past) {
    using T = typename Step::Type;
    const Steps by = operands.steps();
    if constexpr (Planar) {
        const int64_t length = span.s1 - span.s0, all = length * (span.c1 - span.c0);
        // short runs end inside lines: those that follow each other are put together first
        alignas(line) T together[2][Geometry::block];
        const bool gathered = past && length * static_cast<int64_t>(sizeof(T)) < 16 * line &&
                              all <= Geometry::block && by.out == length &&
                              (!operands.dresidual.data || by.dresidual == length);
        for (int64_t n = span.n0; n < span.n1; ++n) {
            Place<T> p = operands.at(n, span.c0, span.s0);
            if (!gathered) {
                write_runs(step, p, by, length, span, numbers, past);
                continue;
            }
            T *const out = p.out, *const dresidual = p.dresidual;
            p.out = together[0];
            if (dresidual) p.dresidual = together[1];
            write_runs(step, p, by, length, span, numbers, false);
            copy_past(out, together[0], all);
            if (dresidual) copy_past(dresidual, together[1], all);
        }
    } else {
        const bool streamed = past && operands.rows_are_aligned();
        each_strip<Step>(span.n1 - span.n0, span.c1 - span.c0,
                      [&](auto K, auto whole, int64_t n, int64_t rows, int64_t c, int count) {
            const Place<T> p = operands.at(span.n0 + n, span.c0 + c, 0);
            if (streamed) write_strip<K, whole, true>(step, p, by, rows, numbers, span.c0 + c, count);
            else write_strip<K, whole, false>(step, p, by, rows, numbers, span.c0 + c, count);
        });
    }
}

// Sums over a span of at most one block into scratch.first and second, a number a channel.
template <bool Planar, class Terms>
inline void sum_block(const Terms& terms, const Operands<typename Terms::Type>& operands, const Span& span,
                      const Coefficients<typename Terms::A>& numbers, Scratch<typename Terms::A>& scratch) {
    using T = typename Terms::Type;
    using A = typename Terms::A;
    const int64_t channels = span.c1 - span.c0;
    const Steps by = operands.steps();
    if constexpr (Planar) {
        for (int64_t c = 0; c < 2 * channels; ++c) scratch.sums[c] = values<A>{};
        for (int64_t n = span.n0; n < span.n1; ++n) {
            Place<T> p = operands.at(n, span.c0, span.s0);
            for (int64_t c = 0; c < channels; ++c, p = moved(p, by, 1))
                sum_run(terms, p, span.s1 - span.s0, numbers.all_lanes(c), &scratch.sums[2 * c]);
        }
        for (int64_t c = 0; c < channels; ++c) {
            scratch.first[c] = sum<A>(scratch.sums[2 * c]);
            scratch.second[c] = sum<A>(scratch.sums[2 * c + 1]);
        }
    } else {
        for (int64_t c = 0; c < channels; ++c) scratch.first[c] = scratch.second[c] = 0;
        each_strip<Terms>(span.n1 - span.n0, channels,
                      [&](auto K, auto whole, int64_t n, int64_t rows, int64_t c, int count) {
            sum_strip<K, whole>(terms, operands.at(span.n0 + n, span.c0 + c, 0), by, rows, numbers, c, count,
                                &scratch.first[c], &scratch.second[c]);
        });
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

// Chan's update: adds moments of `more` values to those of `count`; share = more / (count + more).
inline void merge(double count, double* mean, double* m2, double share, double own, double spread) {
    const double delta = own - *mean;
    *mean += delta * share;
    *m2 += spread + delta * delta * (count * share);
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
    const Spread<T, Planar, Masked> terms{};
    A *const near = scratch.near.get(), *const first = scratch.first.get(), *const second = scratch.second.get();
    const Coefficients<A> numbers{near, near, near, near, near};
    const int64_t channels = span.c1 - span.c0;
    double count = 0;
    for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0;
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
            some.n1 = block.n0 + least(16, ceil_divide(block.n1 - block.n0, 4));
        }
        const A part = static_cast<A>(1 / (Masked ? size : static_cast<double>(some.positions())));
        for (int64_t c = 0; c < channels; ++c) near[c] = 0;
        sum_block<Planar>(terms, operands, some, numbers, scratch);
        for (int64_t c = 0; c < channels; ++c) {
            const A about = first[c] * part;
            near[c] = about - about == 0 ? about : 0;  // infinities go into the sums
        }
        sum_block<Planar>(terms, operands, block, numbers, scratch);
        const double inverse = 1 / size, share = size / (count + size);
        for (int64_t c = 0; c < channels; ++c) {
            const double own = first[c] * inverse, spread = second[c] - first[c] * own;
            merge(count, &mean[c], &m2[c], share, near[c] + own, spread < 0 ? 0 : spread);
        }
        count += size;
    });
}

// sum g and sum g * (x - near) of each channel of a span.
template <class T, Variant V, bool Planar>
void reduce_span(const Operands<T>& operands, const Span& span, const Coefficients<arithmetic<T>>& numbers,
                 const Options& options, Scratch<arithmetic<T>>& scratch, double* sum_g, double* sum_gd) {
    using A = arithmetic<T>;
    const Products<T, V, Planar> terms{options};
    const A *const first = scratch.first.get(), *const second = scratch.second.get();
    const int64_t channels = span.c1 - span.c0;
    for (int64_t c = 0; c < channels; ++c) sum_g[c] = sum_gd[c] = 0;
    each_block<Planar>(span, [&](const Span& block) {
        sum_block<Planar>(terms, operands, block, numbers.from(span.c0), scratch);
        for (int64_t c = 0; c < channels; ++c) {
            sum_g[c] += first[c];
            sum_gd[c] += second[c];
        }
    });
}

}  // namespace BN_ISA
