// The two loops over values: along a run of one channel, and down the rows of a strip of channels.
//
// A row has all channels of a position beside each other. Going down a strip of a few vectors of
// them, the numbers of the channels, and their sums, stay in registers.
#pragma once

#include <type_traits>

#include "pointwise.h"

namespace BN_ISA {

// The numbers of all channels, (width) each.
template <class A> struct Coefficients {
    const A *near, *scale, *shift, *offset, *slope;

    Coefficients from(int64_t c) const { return {near + c, scale + c, shift + c, offset + c, slope + c}; }
    Channel<A> all_lanes(int64_t c) const {  // of one channel
        return {splat(near[c]), splat(scale[c]), splat(shift[c]), splat(offset[c]), splat(slope[c])};
    }
    template <bool Whole> BN_INLINE Channel<A> lanes_from(int64_t c, int count) const {
        return {read<Whole>(near + c, count), read<Whole>(scale + c, count), read<Whole>(shift + c, count),
                read<Whole>(offset + c, count), read<Whole>(slope + c, count)};
    }
};

constexpr int64_t tile = 128;  // rows of a strip before the next one has its turn
// Rows: what is asked for before it is needed. Wide rows are multiples of a page apart, and compete for
// the same few lines of the first cache.
constexpr int64_t far_ahead = 4;

constexpr int64_t bytes_ahead = 2048;  // likewise, along a run

// Asks for the line that a vector begins in, where it begins one: processors do so themselves, but
// not from one page to the next.
template <class T> BN_INLINE void prefetch(const T* from, int64_t j) {
    constexpr int64_t bytes = Vector<arithmetic<T>>::lanes * sizeof(T);
    if (j * bytes % line == 0) __builtin_prefetch(from + j * Vector<arithmetic<T>>::lanes);
}

template <class T> BN_INLINE void prefetch_run(const Place<T>& p, int64_t i, int64_t j) {
    constexpr int64_t ahead = bytes_ahead / sizeof(T);
    prefetch(p.x + i + ahead, j);
    if (p.dy) prefetch(p.dy + i + ahead, j);
}

// --- elementwise ---

template <bool Streamed, class Step>
inline void write_run(const Step& step, const Place<typename Step::Type>& p, int64_t n,
                      const Channel<typename Step::A>& k) {
    constexpr int lanes = Vector<typename Step::A>::lanes;
    constexpr int whole_line = line / (lanes * sizeof(typename Step::Type));  // of vectors
    constexpr int turn = Streamed && whole_line > 2 ? whole_line : 2;
    int64_t i = 0;
    for (; i + turn * lanes <= n; i += turn * lanes) {
#pragma GCC unroll 8
        for (int u = 0; u < turn; ++u) {
            prefetch_run(p, i, u);
            step.template at<true, Streamed>(p, i + u * lanes, 0, k);
        }
    }
    for (; i + lanes <= n; i += lanes) step.template at<true, Streamed && whole_line <= 1>(p, i, 0, k);
    if (i < n) step.template at<false, false>(p, i, static_cast<int>(n - i), k);
}

template <int K, bool Whole, bool Streamed, class Step>
inline void write_strip(const Step step, Place<typename Step::Type> p, const Steps by, int64_t rows,
                        const Coefficients<typename Step::A>& numbers, int64_t c, int count) {
    constexpr int lanes = Vector<typename Step::A>::lanes;
    Channel<typename Step::A> k[K];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) k[j] = numbers.template lanes_from<Whole>(c + j * lanes, count);
    for (; rows > 0; --rows, p = moved(p, by, 1)) {
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) {
            prefetch(p.x + far_ahead * by.x, j);
            if (p.dy) prefetch(p.dy + far_ahead * by.dy, j);
            step.template at<Whole, Streamed>(p, j * lanes, count, k[j]);
        }
    }
}

// --- sums ---

// Both sums go four vectors at a time, as a tree: fewer roundings, which are all to one side where
// the squares are those of coarse numbers.

template <class V> BN_INLINE V tree(const V (&v)[4]) { return (v[0] + v[1]) + (v[2] + v[3]); }

// Adds the two sums of a run to `sums`, a vector each.
template <class Terms>
inline void sum_run(const Terms& terms, const Place<typename Terms::Type>& p, int64_t n,
                    const Channel<typename Terms::A>& k, values<typename Terms::A>* sums) {
    using A = typename Terms::A;
    constexpr int lanes = Vector<A>::lanes;
    values<A> first[2] = {}, second[2] = {}, a[4], b[4];
    int64_t i = 0;
    for (; i + 8 * lanes <= n; i += 8 * lanes) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
                prefetch_run(p, i, 4 * half + u);
                terms.template at<true>(p, i + (4 * half + u) * lanes, 0, k, &a[u], &b[u]);
            }
            first[half] += tree(a);
            second[half] += tree(b);
        }
    }
    for (; i + lanes <= n; i += lanes) {
        terms.template at<true>(p, i, 0, k, a, b);
        first[0] += a[0];
        second[0] += b[0];
    }
    if (i < n) {
        const auto inside = iota<A>() < static_cast<int>(n - i);
        terms.template at<false>(p, i, static_cast<int>(n - i), k, a, b);
        first[1] += inside ? a[0] : values<A>{};
        second[1] += inside ? b[0] : values<A>{};
    }
    sums[0] += first[0] + first[1];
    sums[1] += second[0] + second[1];
}

// Adds the sums of a strip's channels to first and second.
template <int K, bool Whole, class Terms>
inline void sum_strip(const Terms terms, Place<typename Terms::Type> p, const Steps by, int64_t rows,
                      const Coefficients<typename Terms::A>& numbers, int64_t c, int count,
                      typename Terms::A* first, typename Terms::A* second) {
    using A = typename Terms::A;
    constexpr int lanes = Vector<A>::lanes;
    Channel<A> k[K];
    values<A> one[K], two[K];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
        k[j] = numbers.template lanes_from<Whole>(c + j * lanes, count);
        one[j] = read<Whole>(first + j * lanes, count);
        two[j] = read<Whole>(second + j * lanes, count);
    }
    for (; rows >= 4; rows -= 4, p = moved(p, by, 4)) {
        const Place<typename Terms::Type> places[4] = {p, moved(p, by, 1), moved(p, by, 2), moved(p, by, 3)};
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) {
            values<A> a[4], b[4];
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) {
                prefetch(places[r].x + far_ahead * by.x, j);
                if (p.dy) prefetch(places[r].dy + far_ahead * by.dy, j);
                terms.template at<Whole>(places[r], j * lanes, count, k[j], &a[r], &b[r]);
            }
            one[j] += tree(a);
            two[j] += tree(b);
        }
    }
    for (; rows > 0; --rows, p = moved(p, by, 1)) {
#pragma GCC unroll 8
        for (int j = 0; j < K; ++j) {
            values<A> a, b;
            terms.template at<Whole>(p, j * lanes, count, k[j], &a, &b);
            one[j] += a;
            two[j] += b;
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
        write<Whole, false>(first + j * lanes, one[j], count);
        write<Whole, false>(second + j * lanes, two[j], count);
    }
}

// Calls f(K, first channel) for strips of K vectors, and then for one of half as many, and so on, as
// far as whole vectors go. Returns how far that is.
template <int K, int lanes, class F> inline int64_t each_whole_strip(int64_t c, int64_t channels, F f) {
    for (; c + K * lanes <= channels; c += K * lanes) f(std::integral_constant<int, K>{}, c);
    if constexpr (K > 1) return each_whole_strip<K / 2, lanes>(c, channels, f);
    return c;
}

// Cuts rows into tiles of strips: calls f(K, whole, first row, rows, first channel, channels).
template <class Step, class F> inline void each_strip(int64_t rows, int64_t channels, F f) {
    constexpr int lanes = Vector<typename Step::A>::lanes;
    for (int64_t n = 0; n < rows; n += tile) {
        const int64_t high = rows - n < tile ? rows - n : tile;
        const int64_t c = each_whole_strip<Step::strip, lanes>(
            0, channels, [&](auto K, int64_t c) { f(K, std::true_type{}, n, high, c, 0); });
        if (c < channels)
            f(std::integral_constant<int, 1>{}, std::false_type{}, n, high, c, static_cast<int>(channels - c));
    }
}

}  // namespace BN_ISA
