// Selection of packed samples on the CPU: count (one mask byte per sample, one count per ray), scan, fill.
// The fill pass reads the mask of the count pass, so the two cannot disagree about a borderline sample.
#include "abi.h"
#include "compact_math.h"

namespace {

using namespace pmf;

constexpr int64_t kRaysPerTask = 64;

template <typename S>
int64_t sieve_ray(const S* sigmas, const S* t_starts, const S* t_ends, int64_t first, int64_t last, Sieve<S> sieve,
                  uint8_t* mask) {
  int64_t n_kept = 0;
  for (int64_t i = first; i < last; ++i) {
    mask[i] = sieve.keep(attenuation<S>(sigmas[i] * (t_ends[i] - t_starts[i])));
    n_kept += mask[i];
  }
  return n_kept;
}

template <typename S>
int count_kept(const S* sigmas, const S* t_starts, const S* t_ends, const int64_t* ray_offsets, uint8_t* mask,
               int64_t* kept_offsets, int64_t n_rays, int64_t n_samples, Sieve<S> sieve, int64_t n_threads) {
#pragma omp parallel for schedule(dynamic, kRaysPerTask) num_threads(n_threads) \
    if (n_samples + n_rays > PMF_MIN_PARALLEL)
  for (int64_t ray = 0; ray < n_rays; ++ray) {
    kept_offsets[ray + 1] =
        sieve_ray(sigmas, t_starts, t_ends, ray_offsets[ray], ray_offsets[ray + 1], sieve, mask);
  }
  kept_offsets[0] = 0;
  for (int64_t ray = 0; ray < n_rays; ++ray) kept_offsets[ray + 1] += kept_offsets[ray];
  return PMF_OK;
}

}  // namespace

// mask (n_samples) and kept_offsets (n_rays + 1) are written.
#define PMF_DEFINE_COMPACT(S, SUFFIX)                                                                                \
  PMF_EXPORT int pmf_compact_count_cpu_##SUFFIX(const S* sigmas, const S* t_starts, const S* t_ends,                 \
                                                const int64_t* ray_offsets, uint8_t* mask, int64_t* kept_offsets,    \
                                                int64_t n_rays, int64_t n_samples, double transmittance_eps,         \
                                                double alpha_eps, int64_t n_threads) {                               \
    return count_kept<S>(sigmas, t_starts, t_ends, ray_offsets, mask, kept_offsets, n_rays, n_samples,               \
                         {S(transmittance_eps), S(alpha_eps)}, n_threads);                                           \
  }

PMF_DEFINE_COMPACT(float, f32)
PMF_DEFINE_COMPACT(double, f64)

// indices (kept_offsets[n_rays]) is written.
PMF_EXPORT int pmf_compact_fill_cpu(const int64_t* ray_offsets, const uint8_t* mask, const int64_t* kept_offsets,
                                    int64_t* indices, int64_t n_rays, int64_t n_samples, int64_t n_threads) {
#pragma omp parallel for schedule(dynamic, kRaysPerTask) num_threads(n_threads) \
    if (n_samples + n_rays > PMF_MIN_PARALLEL)
  for (int64_t ray = 0; ray < n_rays; ++ray) {
    int64_t* next = indices + kept_offsets[ray];
    for (int64_t i = ray_offsets[ray]; i < ray_offsets[ray + 1]; ++i) {
      if (mask[i] != 0) *next++ = i;
    }
  }
  return PMF_OK;
}
