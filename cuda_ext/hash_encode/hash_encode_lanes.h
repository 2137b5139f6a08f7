// Vectors of one AVX-512 register for the hash grid: loads, gathers of table rows, stores. Generic code is plain gcc
// vectors; the gathers that decide the speed (1 and 2, 4, 8 floats per row) use intrinsics where the target has them.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns about its own undefined-lane idiom
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "host_device.h"

namespace pmf {

// gcc takes no vector sizes that depend on template parameters, so the types are spelled out.
typedef float Float16 __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));
typedef uint32_t Uint16 __attribute__((vector_size(64)));
typedef uint32_t Uint8 __attribute__((vector_size(32)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef int32_t Int8 __attribute__((vector_size(32)));
typedef int64_t Long8 __attribute__((vector_size(64)));

template <class Real>
struct Lanes;

// What float and double share: WIDTH lanes of Real and as many 32-bit indices.
template <class Real, class Vector, class Unsigned, class Int, class Mask>
struct LanesBase {
    static constexpr int WIDTH = 64 / sizeof(Real);
    using Vec = Vector;
    using Uint = Unsigned;

    static PMF_HD Uint to_uint(Vec v) { return (Uint) __builtin_convertvector(v, Int); }
    static PMF_HD Vec to_real(Uint v) { return __builtin_convertvector((Int)v, Vec); }

    // Coordinate AXIS of WIDTH consecutive points (x, y, z, x, y, z, ...), held in three vectors.
    template <int AXIS>
    static PMF_HD Vec every_third(Vec a, Vec b, Vec c) {
        Mask from_ab, from_c;
        for (int i = 0; i < WIDTH; ++i) {
            const int at = 3 * i + AXIS;
            from_ab[i] = at < 2 * WIDTH ? at : 0;
            from_c[i] = at < 2 * WIDTH ? i : at - WIDTH;
        }
        return __builtin_shuffle(__builtin_shuffle(a, b, from_ab), c, from_c);
    }
    static PMF_HD void load3(const Real* points, Vec& x, Vec& y, Vec& z) {
        const Vec a = load(points, WIDTH), b = load(points + WIDTH, WIDTH), c = load(points + 2 * WIDTH, WIDTH);
        x = every_third<0>(a, b, c);
        y = every_third<1>(a, b, c);
        z = every_third<2>(a, b, c);
    }
    static PMF_HD Vec load(const Real* from, int count) {
        Vec v{};
        std::memcpy(&v, from, count == WIDTH ? sizeof v : count * sizeof(Real));
        return v;
    }
    static PMF_HD void store(Real* to, Vec v, int count) {
        std::memcpy(to, &v, count == WIDTH ? sizeof v : count * sizeof(Real));
    }
    template <int F>
    static PMF_HD void gather(const Real* table, Uint row, Vec (&feature)[F]) {
        for (int f = 0; f < F; ++f) {
            Vec lanes{};
            for (int i = 0; i < WIDTH; ++i) lanes[i] = table[static_cast<size_t>(row[i]) * F + f];
            feature[f] = lanes;
        }
    }
    template <int F>
    static PMF_HD void interleave(const Vec (&feature)[F], Real* rows) {
        for (int i = 0; i < WIDTH; ++i)
            for (int f = 0; f < F; ++f) rows[i * F + f] = feature[f][i];
    }
};

template <>
struct Lanes<double> : LanesBase<double, Double8, Uint8, Int8, Long8> {};

template <>
struct Lanes<float> : LanesBase<float, Float16, Uint16, Int16, Int16> {
#ifdef __AVX512F__
    static PMF_HD __m512 gather8(__m256i pair, const float* table) {
        return (__m512)_mm512_i32gather_pd(pair, table, 8);
    }
    // A row is F / 2 pairs of floats; a pair is fetched as one 64-bit lane and then split.
    template <int F>
    static PMF_HD void gather(const float* table, Uint row, Vec (&feature)[F]) {
        const __m512i rows = (__m512i)row;
        if (F == 1) {
            feature[0] = (Vec)_mm512_i32gather_ps(rows, table, 4);
            return;
        }
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
        const __m512i first = _mm512_mullo_epi32(rows, _mm512_set1_epi32(F / 2));
        for (int pair = 0; pair < F / 2; ++pair) {
            const __m512i at = _mm512_add_epi32(first, _mm512_set1_epi32(pair));
            const __m512 low = gather8(_mm512_castsi512_si256(at), table);
            const __m512 high = gather8(_mm512_extracti64x4_epi64(at, 1), table);
            feature[2 * pair] = (Vec)_mm512_permutex2var_ps(low, even, high);
            feature[(2 * pair + 1) % F] = (Vec)_mm512_permutex2var_ps(low, odd, high);
        }
    }
    template <int F>
    static PMF_HD void interleave(const Vec (&feature)[F], float* rows) {
        if (F != 2) return LanesBase::interleave<F>(feature, rows);
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        _mm512_store_ps(rows, _mm512_permutex2var_ps((__m512)feature[0], low, (__m512)feature[F - 1]));
        _mm512_store_ps(rows + 16, _mm512_permutex2var_ps((__m512)feature[0], high, (__m512)feature[F - 1]));
    }
#endif
};

// target[0..F) += value[0..F), as one vector where the row has a vector type.
template <class Real, int F>
PMF_HD void add_row(Real* target, const Real* value) {
    for (int f = 0; f < F; ++f) target[f] += value[f];
}

template <>
PMF_HD void add_row<float, 2>(float* target, const float* value) {
    typedef float Row __attribute__((vector_size(8), aligned(4), may_alias));
    *reinterpret_cast<Row*>(target) += *reinterpret_cast<const Row*>(value);
}

}  // namespace pmf
