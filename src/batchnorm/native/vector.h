// Vectors of the widest registers that this translation unit may use, and how values of the four
// types get in and out of them. Compiled once for each instruction set: BN_ISA names the namespace,
// BN_BYTES is the width of a register.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// For what must be part of its caller's loop.
#define BN_INLINE inline __attribute__((always_inline))

namespace BN_ISA {

using std::int64_t;

struct bfloat16 { std::uint16_t bits; };
struct float16 { std::uint16_t bits; };

// What a storage type is computed in: float, or double for double.
template <class T> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };
template <class T> using arithmetic = typename Arithmetic<T>::type;

template <class A> struct Vector;
template <> struct Vector<float> {
    static constexpr int lanes = BN_BYTES / 4;
    typedef float values __attribute__((vector_size(BN_BYTES)));
    typedef std::int32_t integers __attribute__((vector_size(BN_BYTES)));
    typedef std::uint32_t bits __attribute__((vector_size(BN_BYTES)));
    typedef std::uint16_t halves __attribute__((vector_size(BN_BYTES / 2)));
    static constexpr std::int32_t finite_below = 0x7f800000, magnitude = 0x7fffffff;
};
template <> struct Vector<double> {
    static constexpr int lanes = BN_BYTES / 8;
    typedef double values __attribute__((vector_size(BN_BYTES)));
    typedef std::int64_t integers __attribute__((vector_size(BN_BYTES)));
    static constexpr std::int64_t finite_below = 0x7ff0000000000000, magnitude = 0x7fffffffffffffff;
};
template <class A> using values = typename Vector<A>::values;
template <class A> using integers = typename Vector<A>::integers;
using floats = values<float>;

template <class To, class From> inline To cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast keeps the bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class A> inline values<A> splat(A value) { return value - values<A>{}; }

template <class A> inline integers<A> iota() {
    integers<A> result;
    for (int i = 0; i < Vector<A>::lanes; ++i) result[i] = i;
    return result;
}

// The larger of each two; b where one is NaN.
template <class A> inline values<A> larger(values<A> a, values<A> b) {
#if BN_BYTES == 64
    if constexpr (sizeof(A) == 4) return cast<values<A>>(_mm512_max_ps(cast<__m512>(a), cast<__m512>(b)));
    else return cast<values<A>>(_mm512_max_pd(cast<__m512d>(a), cast<__m512d>(b)));
#elif BN_BYTES == 32
    if constexpr (sizeof(A) == 4) return cast<values<A>>(_mm256_max_ps(cast<__m256>(a), cast<__m256>(b)));
    else return cast<values<A>>(_mm256_max_pd(cast<__m256d>(a), cast<__m256d>(b)));
#else
    return a > b ? a : b;
#endif
}

// The smaller of each two; b where one is NaN.
template <class A> inline values<A> smaller(values<A> a, values<A> b) { return a < b ? a : b; }

// All ones where a lane is not finite.
template <class A> inline integers<A> not_finite(values<A> v) {
    return (cast<integers<A>>(v) & Vector<A>::magnitude) >= Vector<A>::finite_below;
}

template <class A> inline A sum(values<A> v) {  // pairwise, always in the same order
    A parts[Vector<A>::lanes];
    std::memcpy(parts, &v, sizeof parts);
    for (int width = Vector<A>::lanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    return parts[0];
}

// Between half types and float.

inline Vector<float>::bits widened(Vector<float>::halves half) {
#if BN_BYTES == 64  // which GCC would do in two parts
    return cast<Vector<float>::bits>(_mm512_cvtepu16_epi32(cast<__m256i>(half)));
#else
    return __builtin_convertvector(half, Vector<float>::bits);
#endif
}

inline Vector<float>::halves high_halves(Vector<float>::bits bits) {
#if BN_BYTES == 64
    static const std::uint16_t odd[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
    const __m512i picked = _mm512_permutexvar_epi16(_mm512_loadu_si512(odd), cast<__m512i>(bits));
    return cast<Vector<float>::halves>(_mm512_castsi512_si256(picked));
#elif BN_BYTES == 32
    const __m256i all = cast<__m256i>(bits >> 16);
    return cast<Vector<float>::halves>(
        _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
    return __builtin_convertvector(bits >> 16, Vector<float>::halves);
#endif
}

inline floats widen(bfloat16, Vector<float>::halves half) { return cast<floats>(widened(half) << 16); }

// To nearest, ties to even. A NaN stays one if its lower half is 0, as that of all is that come from
// a bfloat16 or from arithmetic: see `quiet`.
inline Vector<float>::halves narrow(bfloat16, floats v) {
    const auto bits = cast<Vector<float>::bits>(v);
    return high_halves(bits + 0x7fff + ((bits >> 16) & 1));
}

// A number as it is, and any NaN as the one that arithmetic makes.
template <class A> inline A quiet(A value) { return value == value ? value : std::numeric_limits<A>::quiet_NaN(); }

#if BN_BYTES == 64
inline floats widen(float16, Vector<float>::halves half) {
    return cast<floats>(_mm512_cvtph_ps(cast<__m256i>(half)));
}
inline Vector<float>::halves narrow(float16, floats v) {
    return cast<Vector<float>::halves>(_mm512_cvtps_ph(cast<__m512>(v), 0));
}
#elif BN_BYTES == 32
inline floats widen(float16, Vector<float>::halves half) {
    return cast<floats>(_mm256_cvtph_ps(cast<__m128i>(half)));
}
inline Vector<float>::halves narrow(float16, floats v) {
    return cast<Vector<float>::halves>(_mm256_cvtps_ph(cast<__m256>(v), 0));
}
#else
inline floats widen(float16, Vector<float>::halves half) {
    const auto bits = widened(half);
    const auto shifted = (bits & 0x7fff) << 13;
    const floats scaled = cast<floats>(shifted) * 0x1p112f;  // moves the exponent, subnormals too
    const auto special = shifted | 0x7f800000;
    const auto magnitude = (bits & 0x7c00) == 0x7c00 ? special : cast<Vector<float>::bits>(scaled);
    return cast<floats>(magnitude | ((bits & 0x8000) << 16));
}
inline Vector<float>::halves narrow(float16, floats v) {
    const auto bits = cast<Vector<float>::bits>(v);
    const auto magnitude = bits & 0x7fffffff;
    // Below 2^-14 an addition aligns the mantissa and rounds it; above, rounding is to even.
    const auto small = cast<Vector<float>::bits>(cast<floats>(magnitude) + 0.5f) - 0x3f000000;
    const auto normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
    const auto large = magnitude > 0x7f800000 ? (magnitude | 0x400000) : (magnitude & 0) + 0x7f800000;
    auto half = magnitude < 0x38800000 ? small : normal;
    half = magnitude >= 0x47800000 ? ((large >> 13) & 0x3ff) | 0x7c00 : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000), Vector<float>::halves);
}
#endif

// What a whole vector of a type is in memory.
template <class T> struct Stored {
    using type = Vector<float>::halves;
    static floats get(type v) { return widen(T{}, v); }
    static type put(floats v) { return narrow(T{}, v); }
};
template <> struct Stored<float> {
    using type = floats;
    static floats get(type v) { return v; }
    static type put(floats v) { return v; }
};
template <> struct Stored<double> {
    using type = values<double>;
    static type get(type v) { return v; }
    static type put(type v) { return v; }
};

template <class T> inline values<arithmetic<T>> load(const T* from) {
    typename Stored<T>::type stored;
    std::memcpy(&stored, from, sizeof stored);
    return Stored<T>::get(stored);
}
template <class T> inline void store(T* to, values<arithmetic<T>> v) {
    const auto stored = Stored<T>::put(v);
    std::memcpy(to, &stored, sizeof stored);
}

// The first `count` lanes, 1 to lanes - 1 of them; the others are read as 0, and not written.
#if BN_BYTES == 64
inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }
inline floats load(const float* from, int count) {
    return cast<floats>(_mm512_maskz_loadu_ps(first_lanes(count), from));
}
inline void store(float* to, floats v, int count) {
    _mm512_mask_storeu_ps(to, first_lanes(count), cast<__m512>(v));
}
inline values<double> load(const double* from, int count) {
    return cast<values<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), from));
}
inline void store(double* to, values<double> v, int count) {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first_lanes(count)), cast<__m512d>(v));
}
template <class T> inline floats load(const T* from, int count) {
    return widen(T{}, cast<Vector<float>::halves>(_mm256_maskz_loadu_epi16(first_lanes(count), from)));
}
template <class T> inline void store(T* to, floats v, int count) {
    _mm256_mask_storeu_epi16(to, first_lanes(count), cast<__m256i>(narrow(T{}, v)));
}
#else
#if BN_BYTES == 32
inline __m256i first_lanes(int count) { return cast<__m256i>(iota<float>() < count); }
inline floats load(const float* from, int count) {
    return cast<floats>(_mm256_maskload_ps(from, first_lanes(count)));
}
inline void store(float* to, floats v, int count) {
    _mm256_maskstore_ps(to, first_lanes(count), cast<__m256>(v));
}
#endif
template <class T> inline values<arithmetic<T>> load(const T* from, int count) {
    typename Stored<T>::type stored{};
    for (int i = 0; i < count; ++i) std::memcpy(reinterpret_cast<T*>(&stored) + i, from + i, sizeof(T));
    return Stored<T>::get(stored);
}
template <class T> inline void store(T* to, values<arithmetic<T>> v, int count) {
    const auto stored = Stored<T>::put(v);
    for (int i = 0; i < count; ++i) std::memcpy(to + i, reinterpret_cast<const T*>(&stored) + i, sizeof(T));
}
#endif

// What memory is moved by, in bytes. Of a line that is written past the caches all should be: what is
// missing costs a read of it.
constexpr int64_t line = 64;

// A store that goes past the caches: `to` is aligned to the size of what is stored.
template <class T> inline void stream(T* to, values<arithmetic<T>> v) {
    const auto stored = Stored<T>::put(v);
#if defined(__x86_64__)
#if BN_BYTES == 64
    if constexpr (sizeof stored == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), cast<__m512i>(stored));
#endif
#if BN_BYTES >= 32
    if constexpr (sizeof stored == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), cast<__m256i>(stored));
#endif
    if constexpr (sizeof stored == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), cast<__m128i>(stored));
#endif
    std::memcpy(to, &stored, sizeof stored);
}

inline void fence() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace BN_ISA
