// Hash grid on the GPU: value (tables of float, double or half), table gradient, input gradient; 1, 2, 4, 8 features.
//
// Levels lie along the grid's y axis, and blocks start in order of x: all points pass one level before the next begins,
// so that a level's rows (4 MB at 2^19 entries) stay in the second level cache. Outputs and gradients are
// (n_levels * F, n), which a warp of neighbouring points reads and writes in whole lines.
//   forward         a thread per point and level; the eight rows are fetched with loads of up to 16 bytes
//   table gradient  many points meet in one row, in no order that is known beforehand: the one use of float atomics,
//                   so results repeat up to the order of summation only. Lanes are laid out (point, corner, feature):
//                   the features of a row, and mostly its neighbour in x, are neighbouring lanes whose additions leave
//                   in one transaction, and no two lanes of a point ever meet. Levels small enough for shared memory
//                   are summed there per block and then added once per row and block: their few rows are in demand by
//                   every point, and additions to one address queue up. Zero gradients, as of samples behind the early
//                   stop, are not added.
//   input gradient  a thread per point adds the levels in order and writes once: no atomics, bitwise repeatable
#include <type_traits>

#include "abi.h"
#include "launch.h"
#include "hash_encode_cuda.h"

namespace {

using namespace pmf;

constexpr int THREADS = 256;
constexpr int GRADIENT_THREADS = 128;          // of the input gradient, which needs many registers
constexpr int64_t SHARED_BYTES = 48 << 10;    // what every GPU grants a block without asking
constexpr int64_t MIN_SHARED_POINTS = 2048;   // per block: additions far outnumber the rows that it writes back
constexpr int64_t MAX_SHARED_BLOCKS = 1024;   // per level
constexpr int64_t STEPS = 16;                 // of a block of the large levels

template <bool HASHED, class Stored, class Real, int F>
__device__ __forceinline__ void interpolate(const Cell<Real, uint32_t>& cell, uint32_t entries, const Stored* rows,
                                            Real (&sum)[F]) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        Real feature[F];
        load_row(rows, corner_index<HASHED>(cell, c, entries), feature);
        const Real weight = corner_weight(cell, c);
#pragma unroll
        for (int f = 0; f < F; ++f) sum[f] += weight * feature[f];
    }
}

template <class Real, class Stored, int F>
__global__ void __launch_bounds__(THREADS)
    forward_kernel(const Real* __restrict__ x, int64_t n, const Stored* __restrict__ table, const Levels<Real> levels,
                   Real* __restrict__ out) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    const int l = blockIdx.y;
    const HashLevel level = levels[l];
    const auto cell = locate_point(load_point(x, i), levels.scale[l], level);
    const Stored* rows = table + levels.first_row[l] * F;
    Real sum[F] = {};
    if (level.hashed) {
        interpolate<true>(cell, level.entries, rows, sum);
    } else {
        interpolate<false>(cell, level.entries, rows, sum);
    }
#pragma unroll
    for (int f = 0; f < F; ++f) out[(static_cast<int64_t>(l) * F + f) * n + i] = sum[f];
}

// ---- table gradient -------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T side(const T (&near_far)[2], bool is_far) {
    return is_far ? near_far[1] : near_far[0];
}

// Adds what points begin .. end - 1 give to the rows of a level; `grad` is (F, n). A thread has one corner and feature.
template <class Real, int F>
__device__ __forceinline__ void add_points(const Real* x, int64_t n, int64_t begin, int64_t end, const Real* grad,
                                           Real scale, const HashLevel& level, Real* rows) {
    constexpr int PER_POINT = 8 * F, POINTS = THREADS / PER_POINT;
    const int f = threadIdx.x % F;
    const unsigned corner = threadIdx.x / F % 8;
    const bool far_x = corner & 1, far_y = corner & 2, far_z = corner & 4;
    for (int64_t i = begin + threadIdx.x / PER_POINT; i < end; i += POINTS) {
        const Real g = grad[f * n + i];
        if (g == 0) continue;
        const auto cell = locate_point(load_point(x, i), scale, level);
        const uint32_t ix = side(cell.x, far_x), iy = side(cell.y, far_y), iz = side(cell.z, far_z);
        const uint32_t row = level.hashed ? grid_index<true>(ix, iy, iz, level.entries)
                                          : grid_index<false>(ix, iy, iz, level.entries);
        const Real weight = side(cell.wx, far_x) * (side(cell.wy, far_y) * side(cell.wz, far_z));
        atomicAdd(rows + static_cast<int64_t>(row) * F + f, weight * g);
    }
}

template <class Real, int F>
__global__ void __launch_bounds__(THREADS)
    table_gradient_kernel(const Real* __restrict__ x, int64_t n, const Real* __restrict__ grad,
                          const Levels<Real> levels, int64_t points_per_block, Real* __restrict__ grad_table) {
    const int l = blockIdx.y;
    const int64_t begin = blockIdx.x * points_per_block;
    const int64_t end = begin + points_per_block < n ? begin + points_per_block : n;
    add_points<Real, F>(x, n, begin, end, grad + levels.number[l] * F * n, levels.scale[l], levels[l],
                        grad_table + levels.first_row[l] * F);
}

// The same through shared memory, for levels of at most SHARED_BYTES.
template <class Real, int F>
__global__ void __launch_bounds__(THREADS)
    shared_table_gradient_kernel(const Real* __restrict__ x, int64_t n, const Real* __restrict__ grad,
                                 const Levels<Real> levels, int64_t points_per_block, Real* __restrict__ grad_table) {
    PMF_DYNAMIC_SHARED(Real, rows);
    const int l = blockIdx.y;
    const HashLevel level = levels[l];
    const int count = static_cast<int>(level.entries) * F;
    for (int k = threadIdx.x; k < count; k += THREADS) rows[k] = 0;
    __syncthreads();
    const int64_t begin = blockIdx.x * points_per_block;
    const int64_t end = begin + points_per_block < n ? begin + points_per_block : n;
    add_points<Real, F>(x, n, begin, end, grad + levels.number[l] * F * n, levels.scale[l], level, rows);
    __syncthreads();
    Real* target = grad_table + levels.first_row[l] * F;
    for (int k = threadIdx.x; k < count; k += THREADS)
        if (rows[k] != 0) atomicAdd(target + k, rows[k]);  // NaN differs from 0 and is added
}

// ---- input gradient -------------------------------------------------------------------------------------------------

// The derivative of the level's g-weighted value in its position (in cells).
template <bool HASHED, class Real, int F>
__device__ __forceinline__ Point<Real> slope(const Cell<Real, uint32_t>& cell, uint32_t entries, const Real* rows,
                                             const Real (&g)[F]) {
    Point<Real> sum{};
#pragma unroll
    for (int c = 0; c < 8; ++c) {
        Real feature[F], dot = 0;
        load_row(rows, corner_index<HASHED>(cell, c, entries), feature);
#pragma unroll
        for (int f = 0; f < F; ++f) dot += g[f] * feature[f];
        const int bx = c & 1, by = (c >> 1) & 1, bz = c >> 2;
        const Real x_part = dot * cell.wy[by] * cell.wz[bz];
        const Real y_part = dot * cell.wx[bx] * cell.wz[bz];
        const Real z_part = dot * cell.wx[bx] * cell.wy[by];
        sum.x = bx ? sum.x + x_part : sum.x - x_part;
        sum.y = by ? sum.y + y_part : sum.y - y_part;
        sum.z = bz ? sum.z + z_part : sum.z - z_part;
    }
    return sum;
}

// False for NaN: clamped, no gradient.
template <class Real>
__device__ __forceinline__ Real where_inside(Real coordinate, Real gradient) {
    return coordinate >= 0 && coordinate <= 1 ? gradient : Real(0);
}

template <class Real, int F>
__global__ void __launch_bounds__(GRADIENT_THREADS)
    input_gradient_kernel(const Real* __restrict__ x, int64_t n, const Real* __restrict__ grad,
                          const Real* __restrict__ table, const Levels<Real> levels, Real* __restrict__ grad_x) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * GRADIENT_THREADS + threadIdx.x;
    if (i >= n) return;
    const Point<Real> p = load_point(x, i);
    Point<Real> sum{};
#pragma unroll 1
    for (int l = 0; l < levels.count; ++l) {
        const HashLevel level = levels[l];
        const auto cell = locate_point(p, levels.scale[l], level);
        const Real* rows = table + levels.first_row[l] * F;
        Real g[F];
#pragma unroll
        for (int f = 0; f < F; ++f) g[f] = grad[(static_cast<int64_t>(l) * F + f) * n + i];
        const Point<Real> part = level.hashed ? slope<true>(cell, level.entries, rows, g)
                                              : slope<false>(cell, level.entries, rows, g);
        sum.x += part.x * levels.scale[l];
        sum.y += part.y * levels.scale[l];
        sum.z += part.z * levels.scale[l];
    }
    grad_x[3 * i] = where_inside(p.x, sum.x);
    grad_x[3 * i + 1] = where_inside(p.y, sum.y);
    grad_x[3 * i + 2] = where_inside(p.z, sum.z);
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <class Real>
Levels<Real> all_levels(const Grid& grid) {
    return select_levels<Real>(grid, [](int64_t) { return true; });
}

template <int F, class Stored>
bool is_row_aligned(const Stored* table) {
    return reinterpret_cast<uintptr_t>(table) % LOAD_BYTES<Stored, F> == 0;
}

template <class Real, class Stored, int F>
int forward(const Real* x, int64_t n, const Stored* table, const Grid& grid, Real* out, void* stream) {
    if (!grid.is_valid() || !is_row_aligned<F>(table)) return PMF_BAD_ARGUMENT;
    const auto levels = all_levels<Real>(grid);
    const dim3 blocks(blocks_for(n, THREADS), static_cast<unsigned>(levels.count));
    return PMF_LAUNCH((forward_kernel<Real, Stored, F>), blocks, dim3(THREADS), 0, stream, x, n, table, levels, out);
}

template <class Real, int F>
int table_gradient(const Real* x, int64_t n, const Real* grad, const Grid& grid, Real* grad_table, void* stream) {
    if (!grid.is_valid()) return PMF_BAD_ARGUMENT;
    constexpr int64_t ROW_BYTES = sizeof(Real) * F;
    PMF_TRY(zero_async(grad_table, grid.n_entries() * ROW_BYTES, stream));
    const auto is_small = [](int64_t entries) { return entries * ROW_BYTES <= SHARED_BYTES; };
    const auto small = select_levels<Real>(grid, is_small);
    const auto large = select_levels<Real>(grid, [&](int64_t entries) { return !is_small(entries); });
    uint32_t most_entries = 0;
    for (int i = 0; i < small.count; ++i)
        most_entries = small.entries[i] > most_entries ? small.entries[i] : most_entries;

    const int64_t share = (n + MAX_SHARED_BLOCKS - 1) / MAX_SHARED_BLOCKS;
    const int64_t points = share > MIN_SHARED_POINTS ? share : MIN_SHARED_POINTS;
    const dim3 small_blocks(blocks_for(n, points), static_cast<unsigned>(small.count));
    PMF_TRY(PMF_LAUNCH((shared_table_gradient_kernel<Real, F>), small_blocks, dim3(THREADS), most_entries * ROW_BYTES,
                       stream, x, n, grad, small, points, grad_table));
    const int64_t large_points = STEPS * THREADS / (8 * F);
    const dim3 large_blocks(blocks_for(n, large_points), static_cast<unsigned>(large.count));
    return PMF_LAUNCH((table_gradient_kernel<Real, F>), large_blocks, dim3(THREADS), 0, stream, x, n, grad, large,
                      large_points, grad_table);
}

template <class Real, int F>
int input_gradient(const Real* x, int64_t n, const Real* grad, const Real* table, const Grid& grid, Real* grad_x,
                   void* stream) {
    if (!grid.is_valid() || !is_row_aligned<F>(table)) return PMF_BAD_ARGUMENT;
    return PMF_LAUNCH((input_gradient_kernel<Real, F>), dim3(blocks_for(n, GRADIENT_THREADS)), dim3(GRADIENT_THREADS),
                      0, stream, x, n, grad, table, all_levels<Real>(grid), grad_x);
}

// Returns body(std::integral_constant<int, F>) for a supported F.
template <class Body>
int with_features(int64_t features, Body body) {
    switch (features) {
        case 1: return body(std::integral_constant<int, 1>{});
        case 2: return body(std::integral_constant<int, 2>{});
        case 4: return body(std::integral_constant<int, 4>{});
        case 8: return body(std::integral_constant<int, 8>{});
        default: return PMF_BAD_ARGUMENT;
    }
}

}  // namespace

// x (n, 3); table (entries, F), aligned to its rows or 16 bytes; out and grad (n_levels * F, n): device memory.
// scales, resolutions (n_levels), offsets (n_levels + 1): host memory; at most 64 levels.
#define PMF_HASH_ENCODE_FORWARD(REAL, STORED, POINTER, SUFFIX)                                                         \
    PMF_EXPORT int pmf_hash_encode_cuda_##SUFFIX(const REAL* x, int64_t n, const POINTER* table, const double* scales, \
                                                 const int64_t* resolutions, const int64_t* offsets,                   \
                                                 int64_t n_levels, int64_t features, REAL* out, void* stream) {        \
        const Grid grid{scales, resolutions, offsets, n_levels};                                                       \
        const auto* rows = static_cast<const STORED*>(table);                                                          \
        return with_features(                                                                                          \
            features, [&](auto f) { return forward<REAL, STORED, f()>(x, n, rows, grid, out, stream); });              \
    }
#define PMF_HASH_ENCODE(REAL, SUFFIX)                                                                                  \
    PMF_HASH_ENCODE_FORWARD(REAL, REAL, REAL, SUFFIX)                                                                  \
    PMF_EXPORT int pmf_hash_encode_backward_table_cuda_##SUFFIX(                                                       \
        const REAL* x, int64_t n, const REAL* grad, const double* scales, const int64_t* resolutions,                  \
        const int64_t* offsets, int64_t n_levels, int64_t features, REAL* grad_table, void* stream) {                  \
        const Grid grid{scales, resolutions, offsets, n_levels};                                                       \
        return with_features(                                                                                          \
            features, [&](auto f) { return table_gradient<REAL, f()>(x, n, grad, grid, grad_table, stream); });        \
    }                                                                                                                  \
    PMF_EXPORT int pmf_hash_encode_backward_x_cuda_##SUFFIX(                                                           \
        const REAL* x, int64_t n, const REAL* grad, const REAL* table, const double* scales,                           \
        const int64_t* resolutions, const int64_t* offsets, int64_t n_levels, int64_t features, REAL* grad_x,          \
        void* stream) {                                                                                                \
        const Grid grid{scales, resolutions, offsets, n_levels};                                                       \
        return with_features(                                                                                          \
            features, [&](auto f) { return input_gradient<REAL, f()>(x, n, grad, table, grid, grad_x, stream); });     \
    }

PMF_HASH_ENCODE(float, f32)
PMF_HASH_ENCODE(double, f64)
PMF_HASH_ENCODE_FORWARD(float, __half, void, f16table_f32)
