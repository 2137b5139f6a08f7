// Marching on the CPU: count (samples per ray), scan (offsets), fill (intervals), and packing of the occupancy bits.
// Count and fill run the same compiled function, so that they cannot disagree by a rounding.
#include <cstring>
#include <memory>
#include <new>

#include "abi.h"
#include "march_math.h"

namespace {

using namespace pmf;

constexpr int64_t kRaysPerTask = 16;
constexpr int64_t kMinRays = 64;  // a ray takes hundreds of look-ups: this many are worth a second thread, and blocks

template <typename S>
struct Rays {
  const S *origins, *directions, *near, *far, *jitter;  // jitter may be null: zeros
  int64_t n;

  MarchRay<S> operator[](int64_t i) const {
    const S *o = origins + 3 * i, *d = directions + 3 * i;
    return {{o[0], o[1], o[2]}, {d[0], d[1], d[2]}, near[i], far[i], jitter != nullptr ? jitter[i] : S(0)};
  }
};

template <typename S>
__attribute__((noinline)) int64_t march_one(const MarchGrid<S>& grid, const MarchRay<S>& ray, S* starts, S* ends) {
  return march_ray<true>(grid, ray, starts, ends);
}

template <typename S>
MarchGrid<S> make_grid(const uint8_t* bits, const S* aabb, int64_t resolution, int64_t n_cascades, double step_min,
                       double step_max, double cone_angle, int64_t max_samples) {
  MarchGrid<S> grid{bits, resolution, n_cascades, {}, {}, S(step_min), S(step_max), S(cone_angle), max_samples};
  for (int a = 0; a < 3; ++a) {
    grid.box_min[a] = aabb[a] > 0 ? aabb[a] : S(0);
    grid.box_max[a] = aabb[3 + a] < 1 ? aabb[3 + a] : S(1);
  }
  return grid;
}

// Which blocks have an occupied cell; null where the grid can have none or memory is short. A block is four bits of each
// of 16 rows of cells, and most words of a trained grid are empty.
template <typename S>
std::unique_ptr<uint8_t[]> find_blocks(const MarchGrid<S>& grid) {
  static_assert(kBlock == 4, "a block's share of a row is half a byte");
  if (!grid.can_have_blocks()) return nullptr;
  const int64_t n = grid.resolution / kBlock, n_quads = grid.n_cascades * n * grid.resolution * grid.resolution;
  std::unique_ptr<uint8_t[]> blocks(new (std::nothrow) uint8_t[grid.n_cascades * n * n * n]());
  if (blocks == nullptr) return nullptr;
  for (int64_t first = 0; first < n_quads; first += 16) {
    uint64_t word = 0;
    const int64_t count = n_quads - first < 16 ? n_quads - first : 16;
    std::memcpy(&word, grid.bits + first / 2, static_cast<size_t>(count + 1) / 2);  // little-endian, as the bits are
    for (int64_t quad = first; word != 0; word >>= 4, ++quad) {
      if ((word & 15) == 0) continue;
      const int64_t row = quad / n, y = row % grid.resolution / kBlock, slab = row / grid.resolution / kBlock;
      blocks[(slab * n + y) * n + quad % n] = 1;
    }
  }
  return blocks;
}

template <typename S>
int count_samples(MarchGrid<S> grid, const Rays<S>& rays, int64_t* ray_offsets, int64_t n_threads) {
  const auto blocks = rays.n > kMinRays ? find_blocks(grid) : nullptr;
  grid.blocks = blocks.get();
#pragma omp parallel for schedule(dynamic, kRaysPerTask) num_threads(n_threads) if (rays.n > kMinRays)
  for (int64_t i = 0; i < rays.n; ++i) ray_offsets[i + 1] = march_one<S>(grid, rays[i], nullptr, nullptr);
  ray_offsets[0] = 0;
  for (int64_t i = 0; i < rays.n; ++i) ray_offsets[i + 1] += ray_offsets[i];
  return PMF_OK;
}

template <typename S>
int fill_samples(MarchGrid<S> grid, const Rays<S>& rays, const int64_t* ray_offsets, S* starts, S* ends,
                 int64_t n_threads) {
  const auto blocks = rays.n > kMinRays ? find_blocks(grid) : nullptr;
  grid.blocks = blocks.get();
#pragma omp parallel for schedule(dynamic, kRaysPerTask) num_threads(n_threads) if (rays.n > kMinRays)
  for (int64_t i = 0; i < rays.n; ++i) {
    MarchGrid<S> until_last = grid;
    until_last.max_samples = ray_offsets[i + 1] - ray_offsets[i];
    march_one<S>(until_last, rays[i], starts + ray_offsets[i], ends + ray_offsets[i]);
  }
  return PMF_OK;
}

// 8 cells to a byte, the first in the lowest bit; NaN is not above any threshold.
template <typename S>
int pack(const S* occs, uint8_t* bits, int64_t n_bytes, S threshold, int64_t n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_bytes > PMF_MIN_PARALLEL)
  for (int64_t i = 0; i < n_bytes; ++i) {
    unsigned byte = 0;
    for (unsigned b = 0; b < 8; ++b) byte |= static_cast<unsigned>(occs[8 * i + b] > threshold) << b;
    bits[i] = static_cast<uint8_t>(byte);
  }
  return PMF_OK;
}

}  // namespace

// rays_o, rays_d: (n_rays, 3); near, far, jitter: (n_rays); jitter may be null; aabb: (2, 3).
// count writes ray_offsets (n_rays + 1); fill reads it and writes t_starts, t_ends (ray_offsets[n_rays]).
#define PMF_DEFINE_MARCH(S, SUFFIX)                                                                                   \
  PMF_EXPORT int pmf_march_count_cpu_##SUFFIX(                                                                        \
      const S* rays_o, const S* rays_d, const S* near, const S* far, const S* jitter, const S* aabb,                  \
      const uint8_t* bits, int64_t n_rays, int64_t resolution, int64_t n_cascades, double step_min, double step_max,  \
      double cone_angle, int64_t max_samples, int64_t* ray_offsets, int64_t n_threads) {                              \
    const auto grid = make_grid<S>(bits, aabb, resolution, n_cascades, step_min, step_max, cone_angle, max_samples);  \
    return count_samples<S>(grid, {rays_o, rays_d, near, far, jitter, n_rays}, ray_offsets, n_threads);               \
  }                                                                                                                   \
  PMF_EXPORT int pmf_march_fill_cpu_##SUFFIX(                                                                         \
      const S* rays_o, const S* rays_d, const S* near, const S* far, const S* jitter, const S* aabb,                  \
      const uint8_t* bits, int64_t n_rays, int64_t resolution, int64_t n_cascades, double step_min, double step_max,  \
      double cone_angle, int64_t max_samples, const int64_t* ray_offsets, S* t_starts, S* t_ends,                     \
      int64_t n_threads) {                                                                                            \
    const auto grid = make_grid<S>(bits, aabb, resolution, n_cascades, step_min, step_max, cone_angle, max_samples);  \
    return fill_samples<S>(grid, {rays_o, rays_d, near, far, jitter, n_rays}, ray_offsets, t_starts, t_ends,          \
                           n_threads);                                                                                \
  }                                                                                                                   \
  /* occs: (8 * n_bytes) */                                                                                           \
  PMF_EXPORT int pmf_pack_bits_cpu_##SUFFIX(const S* occs, uint8_t* bits, int64_t n_bytes, double threshold,          \
                                            int64_t n_threads) {                                                      \
    return pack<S>(occs, bits, n_bytes, S(threshold), n_threads);                                                     \
  }

PMF_DEFINE_MARCH(float, f32)
PMF_DEFINE_MARCH(double, f64)
