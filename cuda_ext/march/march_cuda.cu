// Marching on the GPU: count (samples per ray), scan (offsets), fill (intervals), and packing of the occupancy bits.
//
// A thread walks a ray: the walk is a chain of look-ups of which each depends on the last, and thousands of rays hide
// its latency. Count and fill are one kernel, told apart by its pointers, so that one compiled walk decides about every
// sample and the two cannot disagree by a rounding. Filling stops at the last counted sample, which bounds its writes
// by the buffers and leaves out the empty space behind the scene. No atomics: results are bitwise repeatable.
#include "abi.h"
#include "launch.h"
#include "march_math.h"
#include "scan_cuda.h"

namespace {

using namespace pmf;

constexpr int kThreads = 128;  // small blocks: one long ray holds up three other warps only
constexpr int kPackThreads = 256;

template <typename S>
struct Rays {
  const S *origins, *directions, *near, *far, *jitter;  // jitter may be null: zeros
  const S* aabb;                                        // (2, 3), on the device as the rest
  int64_t n;
};

template <typename S>
__device__ MarchRay<S> ray_at(const Rays<S>& rays, int64_t i) {
  const S *o = rays.origins + 3 * i, *d = rays.directions + 3 * i;
  return {{o[0], o[1], o[2]},
          {d[0], d[1], d[2]},
          rays.near[i],
          rays.far[i],
          rays.jitter != nullptr ? rays.jitter[i] : S(0)};
}

// Counts into counts[i] if `counts` is not null, else fills the samples offsets[i] .. offsets[i + 1] - 1.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    march_kernel(MarchGrid<S> grid, const Rays<S> rays, int64_t* __restrict__ counts,
                 const int64_t* __restrict__ offsets, S* __restrict__ starts, S* __restrict__ ends) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rays.n) return;
  if (counts == nullptr) {
    const int64_t first = offsets[i], room = offsets[i + 1] - first;
    if (room <= 0) return;
    grid.max_samples = room;
    starts += first;
    ends += first;
  }
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    grid.box_min[a] = rays.aabb[a] > 0 ? rays.aabb[a] : S(0);
    grid.box_max[a] = rays.aabb[3 + a] < 1 ? rays.aabb[3 + a] : S(1);
  }
  const int64_t found = march_ray(grid, ray_at(rays, i), starts, ends);
  if (counts != nullptr) counts[i] = found;
}

template <typename S>
int launch_march(const MarchGrid<S>& grid, const Rays<S>& rays, int64_t* counts, const int64_t* offsets, S* starts,
                 S* ends, void* stream) {
  if (rays.n <= 0) return PMF_OK;
  return PMF_LAUNCH((march_kernel<S>), dim3(blocks_for(rays.n, kThreads)), dim3(kThreads), 0, stream, grid, rays,
                    counts, offsets, starts, ends);
}

// A thread compares one cell, a ballot collects a warp's 32 bits, four lanes write them: all accesses are coalesced.
// Cell 0 is the lowest bit; NaN is not above any threshold.
template <typename S>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(const S* __restrict__ occs, uint8_t* __restrict__ bits, int64_t n_bytes, S threshold) {
  const int64_t cell = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x;
  const unsigned word = __ballot_sync(kFullWarp, cell < 8 * n_bytes && occs[cell] > threshold);
  const int lane = threadIdx.x % kWarp;
  const int64_t byte = (cell - lane) / 8 + lane;
  if (lane < 4 && byte < n_bytes) bits[byte] = static_cast<uint8_t>(word >> (8 * lane));
}

template <typename S>
int pack(const S* occs, uint8_t* bits, int64_t n_bytes, S threshold, void* stream) {
  if (n_bytes <= 0) return PMF_OK;
  return PMF_LAUNCH((pack_kernel<S>), dim3(blocks_for(8 * n_bytes, kPackThreads)), dim3(kPackThreads), 0, stream, occs,
                    bits, n_bytes, threshold);
}

template <typename S>
MarchGrid<S> make_grid(const uint8_t* bits, int64_t resolution, int64_t n_cascades, double step_min, double step_max,
                       double cone_angle, int64_t max_samples) {
  return {bits, resolution, n_cascades, {}, {}, S(step_min), S(step_max), S(cone_angle), max_samples};
}

}  // namespace

// rays_o, rays_d: (n_rays, 3); near, far, jitter: (n_rays); jitter may be null; aabb: (2, 3). All on the device.
// count writes ray_offsets (n_rays + 1), with pmf_scan_scratch_bytes(n_rays) bytes of scratch; fill reads it and writes
// t_starts, t_ends (ray_offsets[n_rays]).
#define PMF_DEFINE_MARCH(S, SUFFIX)                                                                                   \
  PMF_EXPORT int pmf_march_count_cuda_##SUFFIX(                                                                       \
      const S* rays_o, const S* rays_d, const S* near, const S* far, const S* jitter, const S* aabb,                  \
      const uint8_t* bits, int64_t n_rays, int64_t resolution, int64_t n_cascades, double step_min, double step_max,  \
      double cone_angle, int64_t max_samples, int64_t* ray_offsets, void* scratch, void* stream) {                    \
    const auto grid = make_grid<S>(bits, resolution, n_cascades, step_min, step_max, cone_angle, max_samples);        \
    PMF_TRY(launch_march<S>(grid, {rays_o, rays_d, near, far, jitter, aabb, n_rays}, ray_offsets + 1, nullptr,        \
                            nullptr, nullptr, stream));                                                               \
    return counts_to_offsets(ray_offsets, n_rays, scratch, stream);                                                   \
  }                                                                                                                   \
  PMF_EXPORT int pmf_march_fill_cuda_##SUFFIX(                                                                        \
      const S* rays_o, const S* rays_d, const S* near, const S* far, const S* jitter, const S* aabb,                  \
      const uint8_t* bits, int64_t n_rays, int64_t resolution, int64_t n_cascades, double step_min, double step_max,  \
      double cone_angle, int64_t max_samples, const int64_t* ray_offsets, S* t_starts, S* t_ends, void* stream) {     \
    const auto grid = make_grid<S>(bits, resolution, n_cascades, step_min, step_max, cone_angle, max_samples);        \
    return launch_march<S>(grid, {rays_o, rays_d, near, far, jitter, aabb, n_rays}, nullptr, ray_offsets, t_starts,   \
                           t_ends, stream);                                                                           \
  }                                                                                                                   \
  /* occs: (8 * n_bytes) */                                                                                           \
  PMF_EXPORT int pmf_pack_bits_cuda_##SUFFIX(const S* occs, uint8_t* bits, int64_t n_bytes, double threshold,         \
                                             void* stream) {                                                          \
    return pack<S>(occs, bits, n_bytes, S(threshold), stream);                                                        \
  }

PMF_DEFINE_MARCH(float, f32)
PMF_DEFINE_MARCH(double, f64)
