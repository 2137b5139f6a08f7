// Hash grid on the CPU: value, table gradient, input gradient. float and double, 1, 2, 4 or 8 features per entry.
//
// Points are taken in blocks of one AVX-512 vector (16 floats, 8 doubles); other instruction sets get the same code
// through gcc's generic vectors. The loops are level-major: one level's rows (4 MB at 2^19 entries) stay in the cache
// while all points pass, and outputs are written as (n_levels * F, n), one contiguous row per feature.
//   forward         tasks are (level, chunk of points); they write disjoint memory
//   table gradient  a level belongs to one thread, which fills it with zeros and adds in the order of the points:
//                   no atomics, bitwise repeatable for any number of threads
//   input gradient  a thread owns a range of points and adds the levels in order
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "abi.h"
#include "../common/host_device.h"
#include "hash_encode_math.h"
#include "hash_encode_lanes.h"

namespace {

using namespace pmf;

constexpr int64_t CHUNK = 4096;           // points per forward task: the output row of a task stays in L1/L2
constexpr int AHEAD = 2;                  // blocks between the prefetch of a block's rows and their use
constexpr size_t IN_CACHE = 512u << 10;   // bytes of a level that a second level cache of 1 MB keeps while it is in use

// Levels of a grid as the ABI passes them; `offsets` has n_levels + 1 values, in entries.
struct Grid {
    const double* scales;
    const int64_t *resolutions, *offsets;
    int64_t n_levels;

    HashLevel level(int64_t l) const { return make_level(scales[l], resolutions[l], offsets[l + 1] - offsets[l]); }
    bool is_parallel(int64_t n) const { return n * n_levels > 8 * PMF_MIN_PARALLEL; }
};

// Walks a range of points in blocks of WIDTH; the last block is a copy padded with zeros.
template <class Real>
struct Blocks {
    static constexpr int WIDTH = Lanes<Real>::WIDTH;
    const Real* x;
    int64_t first, end;
    Real padded[3 * WIDTH] = {};

    Blocks(const Real* x, int64_t begin, int64_t end) : x(x), first(begin), end(end) {}
    PMF_HD explicit operator bool() const { return first < end; }
    PMF_HD void next() { first += WIDTH; }
    PMF_HD bool has_later(int blocks) const { return first + (blocks + 1) * WIDTH <= end; }
    PMF_HD const Real* later(int blocks) const { return x + 3 * (first + blocks * WIDTH); }
    PMF_HD int count() const { return static_cast<int>(std::min<int64_t>(WIDTH, end - first)); }
    PMF_HD const Real* points() {
        if (first + WIDTH <= end) return x + 3 * first;
        std::memcpy(padded, x + 3 * first, sizeof(Real) * 3 * (end - first));
        return padded;
    }
};

template <class Real>
PMF_HD auto locate_block(const Real* x, const HashLevel& level) {
    using L = Lanes<Real>;
    typename L::Vec px, py, pz;
    L::load3(x, px, py, pz);
    const Real scale = static_cast<Real>(level.scale);
    const Real half = Real(0.5);
    return locate<L, typename L::Vec, typename L::Uint>(clamp_unit(px) * scale + half, clamp_unit(py) * scale + half,
                                                        clamp_unit(pz) * scale + half, level);
}

template <class Real, int F>
PMF_HD size_t level_bytes(const HashLevel& level) {
    return sizeof(Real) * F * level.entries;
}

// Asks for the rows that a later block of points will gather. The near and far row in x share a cache line mostly.
template <class Real, int F, bool HASHED>
PMF_HD void prefetch_rows(const Real* points, const Real* table, const HashLevel& level) {
    using L = Lanes<Real>;
    const auto cell = locate_block(points, level);
    for (int c = 0; c < 8; c += 2) {
        const auto rows = corner_index<HASHED>(cell, c, level.entries);
        alignas(64) uint32_t row[L::WIDTH];
        std::memcpy(row, &rows, sizeof rows);
#pragma GCC unroll 16
        for (int i = 0; i < L::WIDTH; ++i) __builtin_prefetch(table + static_cast<size_t>(row[i]) * F);
    }
}

template <class Real, int F, bool HASHED>
void forward_level(const Real* x, int64_t n, int64_t begin, int64_t end, const Real* table, const HashLevel& level,
                   Real* out) {
    using L = Lanes<Real>;
    const bool prefetch = level_bytes<Real, F>(level) >= IN_CACHE;  // at equality for the first touch of each row
    for (Blocks<Real> block(x, begin, end); block; block.next()) {
        if (prefetch && block.has_later(AHEAD)) prefetch_rows<Real, F, HASHED>(block.later(AHEAD), table, level);
        const auto cell = locate_block(block.points(), level);
        typename L::Vec sum[F] = {};
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) {
            typename L::Vec feature[F];
            L::template gather<F>(table, corner_index<HASHED>(cell, c, level.entries), feature);
            const auto weight = corner_weight(cell, c);
            for (int f = 0; f < F; ++f) sum[f] += weight * feature[f];
        }
        for (int f = 0; f < F; ++f) L::store(out + f * n + block.first, sum[f], block.count());
    }
}

// What one block adds to the table: eight rows per point.
template <class Real, int F>
struct Additions {
    static constexpr int WIDTH = Lanes<Real>::WIDTH;
    alignas(64) uint32_t row[8][WIDTH];
    alignas(64) Real value[8][WIDTH * F];
    int count = 0;

    template <bool HASHED>
    PMF_HD void compute(Blocks<Real>& block, int64_t n, const Real* grad, const HashLevel& level) {
        using L = Lanes<Real>;
        const auto cell = locate_block(block.points(), level);
        count = block.count();
        typename L::Vec g[F];
        for (int f = 0; f < F; ++f) g[f] = L::load(grad + f * n + block.first, count);
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) {
            const auto rows = corner_index<HASHED>(cell, c, level.entries);
            std::memcpy(row[c], &rows, sizeof rows);
            typename L::Vec scaled[F];
            const auto weight = corner_weight(cell, c);
            for (int f = 0; f < F; ++f) scaled[f] = weight * g[f];
            L::template interleave<F>(scaled, value[c]);
        }
    }
    PMF_HD void prefetch(const Real* grad_table) const {
        for (int c = 0; c < 8; c += 2)
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i) __builtin_prefetch(grad_table + static_cast<size_t>(row[c][i]) * F, 1);
    }
    PMF_HD void apply(Real* grad_table) const {
        for (int i = 0; i < count; ++i)
#pragma GCC unroll 8
            for (int c = 0; c < 8; ++c)
                add_row<Real, F>(grad_table + static_cast<size_t>(row[c][i]) * F, value[c] + i * F);
    }
};

// Adds block after block in the order of the points; a block's rows are prefetched while its predecessor is added.
template <class Real, int F, bool HASHED>
void table_gradient_level(const Real* x, int64_t n, const Real* grad, const HashLevel& level, Real* grad_table) {
    const bool prefetch = level_bytes<Real, F>(level) > IN_CACHE;  // at equality the zero filling has brought it in
    Additions<Real, F> additions[2];
    int now = 0;
    for (Blocks<Real> block(x, 0, n); block; block.next(), now ^= 1) {
        additions[now].template compute<HASHED>(block, n, grad, level);
        if (prefetch) additions[now].prefetch(grad_table);
        additions[now ^ 1].apply(grad_table);
    }
    additions[now ^ 1].apply(grad_table);
}

template <class Real, int F, bool HASHED>
void input_gradient_level(const Real* x, int64_t n, int64_t begin, int64_t end, const Real* grad, const Real* table,
                          const HashLevel& level, Real* grad_x) {
    using L = Lanes<Real>;
    using Vec = typename L::Vec;
    const bool prefetch = level_bytes<Real, F>(level) >= IN_CACHE;
    for (Blocks<Real> block(x, begin, end); block; block.next()) {
        if (prefetch && block.has_later(AHEAD)) prefetch_rows<Real, F, HASHED>(block.later(AHEAD), table, level);
        const auto cell = locate_block(block.points(), level);
        Vec g[F];
        for (int f = 0; f < F; ++f) g[f] = L::load(grad + f * n + block.first, block.count());
        Vec gx{}, gy{}, gz{};
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) {
            Vec feature[F], dot{};
            L::template gather<F>(table, corner_index<HASHED>(cell, c, level.entries), feature);
            for (int f = 0; f < F; ++f) dot += g[f] * feature[f];
            const int bx = c & 1, by = (c >> 1) & 1, bz = c >> 2;
            const Vec x_part = dot * cell.wy[by] * cell.wz[bz];
            const Vec y_part = dot * cell.wx[bx] * cell.wz[bz];
            const Vec z_part = dot * cell.wx[bx] * cell.wy[by];
            gx = bx ? gx + x_part : gx - x_part;
            gy = by ? gy + y_part : gy - y_part;
            gz = bz ? gz + z_part : gz - z_part;
        }
        const Vec component[3] = {gx, gy, gz};
        for (int d = 0; d < 3; ++d)
            for (int i = 0; i < block.count(); ++i) {
                const Real coordinate = x[3 * (block.first + i) + d];
                const bool inside = coordinate >= 0 && coordinate <= 1;  // false for NaN: clamped, no gradient
                if (inside) grad_x[3 * (block.first + i) + d] += component[d][i] * static_cast<Real>(level.scale);
            }
    }
}

template <class Real, int F>
void forward(const Real* x, int64_t n, const Real* table, const Grid& grid, Real* out, int64_t n_threads) {
    const int64_t n_chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) if (grid.is_parallel(n))
    for (int64_t task = 0; task < n_chunks * grid.n_levels; ++task) {
        const int64_t l = task / n_chunks, begin = task % n_chunks * CHUNK, end = std::min(n, begin + CHUNK);
        const HashLevel level = grid.level(l);
        const auto run = level.hashed ? forward_level<Real, F, true> : forward_level<Real, F, false>;
        run(x, n, begin, end, table + grid.offsets[l] * F, level, out + l * F * n);
    }
}

template <class Real, int F>
void table_gradient(const Real* x, int64_t n, const Real* grad, const Grid& grid, Real* grad_table, int64_t n_threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) if (grid.is_parallel(n))
    for (int64_t task = 0; task < grid.n_levels; ++task) {
        const int64_t l = grid.n_levels - 1 - task;  // the large levels first: they take longest
        const HashLevel level = grid.level(l);
        Real* rows = grad_table + grid.offsets[l] * F;
        std::memset(rows, 0, sizeof(Real) * level.entries * F);
        const auto run = level.hashed ? table_gradient_level<Real, F, true> : table_gradient_level<Real, F, false>;
        run(x, n, grad + l * F * n, level, rows);
    }
}

template <class Real, int F>
void input_gradient(const Real* x, int64_t n, const Real* grad, const Real* table, const Grid& grid, Real* grad_x,
                    int64_t n_threads) {
    std::memset(grad_x, 0, sizeof(Real) * 3 * n);
    const int64_t part = std::max<int64_t>(CHUNK, (n / (2 * n_threads) + 15) / 16 * 16);
    const int64_t n_parts = (n + part - 1) / part;
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) if (grid.is_parallel(n))
    for (int64_t p = 0; p < n_parts; ++p)
        for (int64_t l = 0; l < grid.n_levels; ++l) {
            const HashLevel level = grid.level(l);
            const auto run = level.hashed ? input_gradient_level<Real, F, true> : input_gradient_level<Real, F, false>;
            run(x, n, p * part, std::min(n, (p + 1) * part), grad + l * F * n, table + grid.offsets[l] * F, level,
                grad_x);
        }
}

// Calls body(std::integral_constant<int, F>) for a supported F.
template <class Body>
int with_features(int64_t features, Body body) {
    switch (features) {
        case 1: body(std::integral_constant<int, 1>{}); return PMF_OK;
        case 2: body(std::integral_constant<int, 2>{}); return PMF_OK;
        case 4: body(std::integral_constant<int, 4>{}); return PMF_OK;
        case 8: body(std::integral_constant<int, 8>{}); return PMF_OK;
        default: return PMF_BAD_ARGUMENT;
    }
}

}  // namespace

// x (n, 3); table (entries, F); out and grad (n_levels * F, n); scales, resolutions (n_levels), offsets (n_levels + 1).
#define PMF_HASH_ENCODE(REAL, SUFFIX)                                                                                  \
    PMF_EXPORT int pmf_hash_encode_cpu_##SUFFIX(const REAL* x, int64_t n, const REAL* table, const double* scales,     \
                                                const int64_t* resolutions, const int64_t* offsets, int64_t n_levels,  \
                                                int64_t features, REAL* out, int64_t n_threads) {                      \
        const Grid grid{scales, resolutions, offsets, n_levels};                                                       \
        return with_features(features, [&](auto f) { forward<REAL, f()>(x, n, table, grid, out, n_threads); });        \
    }                                                                                                                  \
    PMF_EXPORT int pmf_hash_encode_backward_table_cpu_##SUFFIX(                                                        \
        const REAL* x, int64_t n, const REAL* grad, const double* scales, const int64_t* resolutions,                  \
        const int64_t* offsets, int64_t n_levels, int64_t features, REAL* grad_table, int64_t n_threads) {             \
        const Grid grid{scales, resolutions, offsets, n_levels};                                                       \
        return with_features(                                                                                          \
            features, [&](auto f) { table_gradient<REAL, f()>(x, n, grad, grid, grad_table, n_threads); });            \
    }                                                                                                                  \
    PMF_EXPORT int pmf_hash_encode_backward_x_cpu_##SUFFIX(                                                            \
        const REAL* x, int64_t n, const REAL* grad, const REAL* table, const double* scales,                           \
        const int64_t* resolutions, const int64_t* offsets, int64_t n_levels, int64_t features, REAL* grad_x,          \
        int64_t n_threads) {                                                                                           \
        const Grid grid{scales, resolutions, offsets, n_levels};                                                       \
        return with_features(                                                                                          \
            features, [&](auto f) { input_gradient<REAL, f()>(x, n, grad, table, grid, grad_x, n_threads); });         \
    }

PMF_HASH_ENCODE(float, f32)
PMF_HASH_ENCODE(double, f64)
