// How a batch is cut: into groups of channels, and chunks of positions. The cut depends on the
// shape and the layout alone and never on the number of threads, and so neither do the sums.
#pragma once

#include "call.h"
#include "vector.h"

namespace BN_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A part of a batch: some channels at some positions.
struct Span {
    int64_t c0, c1, n0, n1, s0, s1;

    int64_t positions() const { return (n1 - n0) * (s1 - s0); }
};

class Geometry {
public:
    static constexpr int64_t block = 4096;     // values of one channel summed in float, planar
    static constexpr int64_t block_rows = 256;  // the same, interleaved

    bool planar;
    int64_t N, C, S;
    int64_t fold = 1;    // so many rows of few channels are seen as one wide row
    int64_t width;       // channels times fold
    int64_t group;       // wide channels in a group
    int64_t groups, chunks;

    // `dense`: the rows follow each other without gaps in all tensors, and have no weights.
    Geometry(bool planar, int64_t N, int64_t C, int64_t S, bool dense)
        : planar(planar), N(N), C(C), S(S), width(C) {
        if (planar) {
            group = S >= block / 2 ? 1 : least(64, ceil_divide(block / 2, most(S, 1)));
            parts = most(1, ceil_divide(S, long_run));
            length = ceil_divide(ceil_divide(S, parts), 64) * 64;
            step = parts > 1 ? 1 : most(1, long_run / most(S, 1));
            chunks = S ? ceil_divide(N, step) * parts : 0;
        } else {
            if (dense && C > 0 && (C < 64 || (C < 256 && C % 16 != 0))) {
                while (width < 64 || (width % 16 != 0)) width *= 2, fold *= 2;
            }
            rows = N / fold;
            group = fold > 1 ? width : least(C, 256);
            step = most(1, ceil_divide(ceil_divide(rows, block_rows), 64)) * block_rows;
            chunks = ceil_divide(rows, step) + (rows * fold < N);
        }
        groups = C ? ceil_divide(width, group) : 0;
    }

    Span span(int64_t g, int64_t k) const {
        const int64_t c0 = g * group, c1 = least(width, c0 + group);
        if (planar) {
            const int64_t n0 = k / parts * step, s0 = least(S, k % parts * length);
            return {c0, c1, n0, least(N, n0 + step), s0, least(S, s0 + length)};
        }
        const int64_t n0 = k * step;
        if (n0 >= rows) return {c0, least(c1, (N - rows * fold) * C), rows, rows + 1, 0, 1};
        return {c0, c1, n0, least(rows, n0 + step), 0, 1};
    }

    // How many of the `width` channels the chunk has: fewer in a last, shorter row.
    int64_t chunk_width(int64_t k) const {
        return !planar && k * step >= rows ? (N - rows * fold) * C : width;
    }

private:
    static constexpr int64_t long_run = 8 * block;
    int64_t parts = 1, length = 1, step = 1, rows = 0;
};

}  // namespace BN_ISA
