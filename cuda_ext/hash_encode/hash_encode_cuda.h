// What the hash grid's kernels share: the levels as a kernel parameter, points to cells, and rows of a table.
#pragma once
#include <cstdint>
#include <cstring>

#include "launch.h"
#include "hash_encode_math.h"

namespace pmf {

constexpr int MAX_LEVELS = 64;

// Levels of a grid as the ABI passes them (host memory); `offsets` has n_levels + 1 values, in entries.
struct Grid {
    const double* scales;
    const int64_t *resolutions, *offsets;
    int64_t n_levels;

    bool is_valid() const { return n_levels >= 0 && n_levels <= MAX_LEVELS; }
    int64_t entries(int64_t l) const { return offsets[l + 1] - offsets[l]; }
    int64_t n_entries() const { return n_levels > 0 ? offsets[n_levels] : 0; }
};

// The levels that a kernel works on, all or some of a grid's: 2 KB, passed by value. Scales come in the kernel's
// precision: graphics cards are slow at double precision, conversions included.
template <class Real>
struct Levels {
    int64_t first_row[MAX_LEVELS];
    Real scale[MAX_LEVELS];
    uint32_t stride_y[MAX_LEVELS], stride_z[MAX_LEVELS], entries[MAX_LEVELS];
    uint8_t is_hashed[MAX_LEVELS], number[MAX_LEVELS];  // `number`: place in the grid, and so in outputs and gradients
    int count;

    PMF_HD HashLevel operator[](int i) const {
        return {static_cast<double>(scale[i]), stride_y[i], stride_z[i], entries[i], is_hashed[i] != 0};
    }
};

// The levels of the grid for which keep(entries) holds.
template <class Real, class Keep>
Levels<Real> select_levels(const Grid& grid, Keep keep) {
    Levels<Real> levels{};
    for (int64_t l = 0; l < grid.n_levels; ++l) {
        if (!keep(grid.entries(l))) continue;
        const HashLevel level = make_level(grid.scales[l], grid.resolutions[l], grid.entries(l));
        const int i = levels.count++;
        levels.first_row[i] = grid.offsets[l];
        levels.scale[i] = static_cast<Real>(level.scale);
        levels.stride_y[i] = level.stride_y;
        levels.stride_z[i] = level.stride_z;
        levels.entries[i] = level.entries;
        levels.is_hashed[i] = level.hashed;
        levels.number[i] = static_cast<uint8_t>(l);
    }
    return levels;
}

template <class Real>
struct Scalar {
    static PMF_HD uint32_t to_uint(Real v) { return static_cast<uint32_t>(v); }
    static PMF_HD Real to_real(uint32_t v) { return static_cast<Real>(static_cast<int32_t>(v)); }
};

template <class Real>
struct Point {
    Real x, y, z;
};

template <class Real>
PMF_HD Point<Real> load_point(const Real* x, int64_t i) {
    return {x[3 * i], x[3 * i + 1], x[3 * i + 2]};
}

template <class Real>
PMF_HD Cell<Real, uint32_t> locate_point(const Point<Real>& p, Real scale, const HashLevel& level) {
    const Real half = Real(0.5);
    return locate<Scalar<Real>, Real, uint32_t>(clamp_unit(p.x) * scale + half, clamp_unit(p.y) * scale + half,
                                                clamp_unit(p.z) * scale + half, level);
}

// Unsigned types of the loads that fetch a row: up to 16 bytes at a time.
template <int BYTES>
struct Words;
template <> struct Words<2> { using Type = unsigned short; };
template <> struct Words<4> { using Type = unsigned; };
template <> struct Words<8> { using Type = uint2; };
template <> struct Words<16> { using Type = uint4; };

template <class Stored, int F>
constexpr int LOAD_BYTES = sizeof(Stored) * F < 16 ? static_cast<int>(sizeof(Stored)) * F : 16;

// Row `row` of a table whose base is aligned to LOAD_BYTES, as F values of the kernel's precision.
template <int F, class Stored, class Real>
__device__ __forceinline__ void load_row(const Stored* table, uint32_t row, Real (&values)[F]) {
    constexpr int LOADS = sizeof(Stored) * F / LOAD_BYTES<Stored, F>;
    using Word = typename Words<LOAD_BYTES<Stored, F>>::Type;
    const Word* from = reinterpret_cast<const Word*>(table) + static_cast<int64_t>(row) * LOADS;
    Word words[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; ++k) words[k] = __ldg(from + k);
    Stored stored[F];
    memcpy(static_cast<void*>(stored), words, sizeof stored);
#pragma unroll
    for (int f = 0; f < F; ++f) values[f] = static_cast<Real>(stored[f]);
}

}  // namespace pmf
