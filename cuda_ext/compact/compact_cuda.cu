// Selection of packed samples on the GPU: count (one mask byte per sample, one count per ray), scan, fill.
//
// A warp takes a ray and its lanes 32 neighbouring samples, so that memory is read in whole lines and the exponentials
// are evaluated side by side. The transmittance in front of a sample is multiplied up in the order of the samples, not
// as a tree: lane k takes the factors of the lanes before it one by one from shuffles, which do not wait for each
// other. That is 32 multiplications for 32 samples, and the very product that a sequential walk forms, so that a
// borderline sample is kept or dropped as by the CPU rule. The fill pass reads the mask of the count pass and cannot
// disagree with it. No atomics: results are bitwise repeatable. All samples are walked, also behind opaque matter,
// because a NaN there is kept.
#include "abi.h"
#include "launch.h"
#include "compact_math.h"
#include "scan_cuda.h"

namespace {

using namespace pmf;

constexpr int kThreads = 256;
constexpr int kRaysPerBlock = kThreads / kWarp;

__device__ int64_t ray_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kRaysPerBlock + threadIdx.x / kWarp;
}

// Transmittance in front of this lane's sample, given that in front of lane 0's.
template <typename S>
__device__ S transmittance_of_lane(S first, S pass, int lane) {
#pragma unroll
  for (int j = 0; j < kWarp - 1; ++j) {
    const S factor = __shfl_sync(kFullWarp, pass, j);
    if (j < lane) first *= factor;
  }
  return first;
}

template <typename S>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const S* __restrict__ sigmas, const S* __restrict__ t_starts, const S* __restrict__ t_ends,
                 const int64_t* __restrict__ ray_offsets, uint8_t* __restrict__ mask, int64_t* __restrict__ counts,
                 int64_t n_rays, Sieve<S> sieve) {
  const int64_t ray = ray_of_warp();
  if (ray >= n_rays) return;  // a whole warp; there are no block barriers
  const int lane = threadIdx.x % kWarp;
  const int64_t last = ray_offsets[ray + 1];
  int64_t n_kept = 0;
  for (int64_t base = ray_offsets[ray]; base < last; base += kWarp) {
    const int64_t i = base + lane;
    Attenuation<S> sample{S(0), S(1)};
    if (i < last) sample = attenuation<S>(sigmas[i] * (t_ends[i] - t_starts[i]));
    sieve.transmittance = transmittance_of_lane(sieve.transmittance, sample.pass, lane);
    const bool is_kept = sieve.keep(sample) && i < last;
    if (i < last) mask[i] = is_kept;
    n_kept += __popc(__ballot_sync(kFullWarp, is_kept));
    sieve.transmittance = __shfl_sync(kFullWarp, sieve.transmittance, kWarp - 1);
  }
  if (lane == 0) counts[ray] = n_kept;
}

__global__ void __launch_bounds__(kThreads)
    fill_kernel(const int64_t* __restrict__ ray_offsets, const uint8_t* __restrict__ mask,
                const int64_t* __restrict__ kept_offsets, int64_t* __restrict__ indices, int64_t n_rays) {
  const int64_t ray = ray_of_warp();
  if (ray >= n_rays) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t last = ray_offsets[ray + 1];
  int64_t next = kept_offsets[ray];
  for (int64_t base = ray_offsets[ray]; base < last; base += kWarp) {
    const int64_t i = base + lane;
    const bool is_kept = i < last && mask[i] != 0;
    const unsigned kept = __ballot_sync(kFullWarp, is_kept);
    if (is_kept) indices[next + __popc(kept & ((1u << lane) - 1))] = i;
    next += __popc(kept);
  }
}

template <typename S>
int count_kept(const S* sigmas, const S* t_starts, const S* t_ends, const int64_t* ray_offsets, uint8_t* mask,
               int64_t* kept_offsets, int64_t n_rays, Sieve<S> sieve, void* scratch, void* stream) {
  if (n_rays > 0) {
    PMF_TRY(PMF_LAUNCH((count_kernel<S>), dim3(blocks_for(n_rays, kRaysPerBlock)), dim3(kThreads), 0, stream, sigmas,
                       t_starts, t_ends, ray_offsets, mask, kept_offsets + 1, n_rays, sieve));
  }
  return counts_to_offsets(kept_offsets, n_rays, scratch, stream);
}

}  // namespace

// mask (n_samples) and kept_offsets (n_rays + 1) are written; scratch has pmf_scan_scratch_bytes(n_rays) bytes.
#define PMF_DEFINE_COMPACT(S, SUFFIX)                                                                                \
  PMF_EXPORT int pmf_compact_count_cuda_##SUFFIX(const S* sigmas, const S* t_starts, const S* t_ends,                \
                                                 const int64_t* ray_offsets, uint8_t* mask, int64_t* kept_offsets,   \
                                                 int64_t n_rays, int64_t /*n_samples*/, double transmittance_eps,    \
                                                 double alpha_eps, void* scratch, void* stream) {                    \
    return count_kept<S>(sigmas, t_starts, t_ends, ray_offsets, mask, kept_offsets, n_rays,                          \
                         {S(transmittance_eps), S(alpha_eps)}, scratch, stream);                                     \
  }

PMF_DEFINE_COMPACT(float, f32)
PMF_DEFINE_COMPACT(double, f64)

// indices (kept_offsets[n_rays]) is written.
PMF_EXPORT int pmf_compact_fill_cuda(const int64_t* ray_offsets, const uint8_t* mask, const int64_t* kept_offsets,
                                     int64_t* indices, int64_t n_rays, int64_t /*n_samples*/, void* stream) {
  if (n_rays <= 0) return PMF_OK;
  return PMF_LAUNCH((fill_kernel), dim3(blocks_for(n_rays, kRaysPerBlock)), dim3(kThreads), 0, stream, ray_offsets,
                    mask, kept_offsets, indices, n_rays);
}
