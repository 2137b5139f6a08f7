// Compositing of packed samples on the CPU: one ray at a time, rays spread over threads.
//
// Forward: a block of samples of the ray goes through the vectorised exponential, then through the sequential product
// that gives the weights; the feature rows of the kept samples are added up. Samples behind the early stop are not read.
// Backward: a first pass leaves T_{i+1} where the gradient of sigma will be; a second one walks from the last kept
// sample to the first with the sum of what lies behind, so that no difference of two large sums is ever taken. Every
// feature row is read once and every gradient row written once.
// All writes of a ray are made by one thread in a fixed order: results do not depend on the number of threads.
#include <algorithm>

#include "abi.h"
#include "composite_math.h"
#include "feature_rows.h"

namespace {

using namespace pmf;

constexpr int64_t kBlock = 256;      // samples whose attenuation is computed at once, on the stack
constexpr int64_t kRaysPerTask = 16;

template <typename S>
struct Samples {
  const S *sigmas, *t_starts, *t_ends, *rgbs, *features;
  const int64_t* ray_offsets;
  int64_t n_rays, n_samples, n_channels, feature_stride;
  S early_stop_eps;
};

template <typename S>
struct Outputs {
  S *rgb, *depth, *opacity, *features, *weights;
};

// Cotangents of the outputs; null where there is none.
template <typename S>
struct Cotangents {
  const S *rgb, *depth, *opacity, *features, *weights;
};

// Gradients of the inputs; null where none is wanted. `sigmas` is there when any of the first three is wanted.
template <typename S>
struct Gradients {
  S *sigmas, *t_starts, *t_ends, *rgbs, *features;
};

template <typename S>
bool is_parallel(const Samples<S>& in) {
  return in.n_samples * (1 + in.n_channels / 8) + in.n_rays > PMF_MIN_PARALLEL;
}

// Weights and transmittances behind the samples of [first, last) until the light is used up.
// Calls visit(i, weight, transmittance_after) for every kept sample; returns one past the last kept sample.
template <typename S, typename Visit>
int64_t walk(const Samples<S>& in, int64_t first, int64_t last, S* transmittance, Visit visit) {
  S alpha[kBlock], pass[kBlock];
  const int64_t n = last - first;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t i = first + j;
    const Attenuation<S> a = attenuation<S>(in.sigmas[i] * (in.t_ends[i] - in.t_starts[i]));
    alpha[j] = a.alpha;
    pass[j] = a.pass;
  }
  S before = *transmittance;
  int64_t j = 0;
  for (; j < n && !(before < in.early_stop_eps); ++j) {
    const S after = before * pass[j];
    visit(first + j, before * alpha[j], after);
    before = after;
  }
  *transmittance = before;
  return first + j;
}

template <typename S>
void composite_ray(const Samples<S>& in, const Outputs<S>& out, int64_t ray) {
  const int64_t first = in.ray_offsets[ray], last = in.ray_offsets[ray + 1];
  S* features = out.features + ray * in.n_channels;
  std::fill(features, features + in.n_channels, S(0));
  S red = 0, green = 0, blue = 0, depth = 0, opacity = 0, transmittance = 1;
  int64_t kept = first;
  for (int64_t block = first; block < last && kept == block; block += kBlock) {
    const int64_t block_end = std::min(block + kBlock, last);
    kept = walk(in, block, block_end, &transmittance, [&](int64_t i, S weight, S) {
      out.weights[i] = weight;
      red += weight * in.rgbs[3 * i];
      green += weight * in.rgbs[3 * i + 1];
      blue += weight * in.rgbs[3 * i + 2];
      depth += weight * (S(0.5) * (in.t_starts[i] + in.t_ends[i]));
      opacity += weight;
    });
    if (in.n_channels > 0) {
      add_rows(features, in.features + block * in.feature_stride, in.feature_stride, out.weights + block, kept - block,
               in.n_channels);
    }
  }
  std::fill(out.weights + kept, out.weights + last, S(0));
  out.rgb[3 * ray] = red;
  out.rgb[3 * ray + 1] = green;
  out.rgb[3 * ray + 2] = blue;
  out.depth[ray] = depth;
  out.opacity[ray] = opacity;
}

template <typename S>
int composite(const Samples<S>& in, const Outputs<S>& out, int64_t n_threads) {
#pragma omp parallel for schedule(dynamic, kRaysPerTask) num_threads(n_threads) if (is_parallel(in))
  for (int64_t ray = 0; ray < in.n_rays; ++ray) composite_ray(in, out, ray);
  return PMF_OK;
}

// Leaves T_{i+1} of the kept samples in `after`; returns one past the last kept sample.
template <typename S>
int64_t transmittances_after(const Samples<S>& in, int64_t first, int64_t last, S* after) {
  S transmittance = 1;
  int64_t kept = first;
  for (int64_t block = first; block < last && kept == block; block += kBlock) {
    kept = walk(in, block, std::min(block + kBlock, last), &transmittance, [&](int64_t i, S, S t) { after[i] = t; });
  }
  return kept;
}

template <typename S>
void clear_dropped(const Gradients<S>& grad, int64_t kept, int64_t last, int64_t n_channels) {
  if (grad.sigmas != nullptr) std::fill(grad.sigmas + kept, grad.sigmas + last, S(0));
  if (grad.t_starts != nullptr) std::fill(grad.t_starts + kept, grad.t_starts + last, S(0));
  if (grad.t_ends != nullptr) std::fill(grad.t_ends + kept, grad.t_ends + last, S(0));
  if (grad.rgbs != nullptr) std::fill(grad.rgbs + 3 * kept, grad.rgbs + 3 * last, S(0));
  if (grad.features != nullptr) std::fill(grad.features + kept * n_channels, grad.features + last * n_channels, S(0));
}

template <typename S, bool kDot, bool kWrite, bool kStream>
void gradient_ray(const Samples<S>& in, const S* weights, const Cotangents<S>& cot, const Gradients<S>& grad,
                  int64_t ray) {
  const int64_t first = in.ray_offsets[ray], last = in.ray_offsets[ray + 1];
  const bool is_density_wanted = grad.sigmas != nullptr;
  const int64_t kept = is_density_wanted ? transmittances_after(in, first, last, grad.sigmas) : last;
  clear_dropped(grad, kept, last, in.n_channels);
  const S zero[3] = {0, 0, 0};
  const S* rgb = cot.rgb != nullptr ? cot.rgb + 3 * ray : zero;
  const S depth = cot.depth != nullptr ? cot.depth[ray] : S(0);
  const S opacity = cot.opacity != nullptr ? cot.opacity[ray] : S(0);
  const S* features = cot.features != nullptr ? cot.features + ray * in.n_channels : nullptr;
  DensityGradient<S> density;
  for (int64_t i = kept - 1; i >= first; --i) {
    const S weight = weights[i];
    S score = opacity + (cot.weights != nullptr ? cot.weights[i] : S(0));
    if constexpr (kDot || kWrite) {
      score += gradient_row<S, kDot, kWrite, kStream>(in.features + i * in.feature_stride, features, weight,
                                                      grad.features + i * in.n_channels, in.n_channels);
    }
    if (grad.rgbs != nullptr) {
      for (int c = 0; c < 3; ++c) grad.rgbs[3 * i + c] = weight * rgb[c];
    }
    if (!is_density_wanted) continue;
    for (int c = 0; c < 3; ++c) score += rgb[c] * in.rgbs[3 * i + c];
    score += depth * (S(0.5) * (in.t_starts[i] + in.t_ends[i]));
    const S grad_tau = density.step(weight, grad.sigmas[i], score);
    const S along = grad_tau * in.sigmas[i], middle = S(0.5) * weight * depth;
    grad.sigmas[i] = grad_tau * (in.t_ends[i] - in.t_starts[i]);
    if (grad.t_starts != nullptr) grad.t_starts[i] = middle - along;
    if (grad.t_ends != nullptr) grad.t_ends[i] = middle + along;
  }
}

template <typename S, bool kDot, bool kWrite, bool kStream>
int gradient_rays(const Samples<S>& in, const S* weights, const Cotangents<S>& cot, const Gradients<S>& grad,
                  int64_t n_threads) {
#pragma omp parallel num_threads(n_threads) if (is_parallel(in))
  {
#pragma omp for schedule(dynamic, kRaysPerTask) nowait
    for (int64_t ray = 0; ray < in.n_rays; ++ray) gradient_ray<S, kDot, kWrite, kStream>(in, weights, cot, grad, ray);
    if constexpr (kStream) fence_streams();
  }
  return PMF_OK;
}

template <typename S>
int composite_backward(const Samples<S>& in, const S* weights, const Cotangents<S>& cot, const Gradients<S>& grad,
                       int64_t n_threads) {
  const bool has_features = cot.features != nullptr && in.n_channels > 0;
  const bool dot = has_features && grad.sigmas != nullptr, write = has_features && grad.features != nullptr;
  if (!write) return (dot ? gradient_rays<S, true, false, false> : gradient_rays<S, false, false, false>)(
      in, weights, cot, grad, n_threads);
  const int64_t row_bytes = in.n_channels * static_cast<int64_t>(sizeof(S)), bytes = in.n_samples * row_bytes;
  const bool is_aligned = row_bytes % kVectorBytes == 0 && reinterpret_cast<uintptr_t>(grad.features) % kVectorBytes == 0;
  const bool stream = bytes >= kStreamBytes && is_aligned;
  const auto run = dot ? (stream ? gradient_rays<S, true, true, true> : gradient_rays<S, true, true, false>)
                       : (stream ? gradient_rays<S, false, true, true> : gradient_rays<S, false, true, false>);
  return run(in, weights, cot, grad, n_threads);
}

}  // namespace

// features may be null when n_channels is 0; features has rows of n_channels values, feature_stride values apart.
#define PMF_DEFINE_COMPOSITE(S, SUFFIX)                                                                                \
  PMF_EXPORT int pmf_composite_cpu_##SUFFIX(                                                                           \
      const S* sigmas, const S* t_starts, const S* t_ends, const S* rgbs, const S* features,                           \
      const int64_t* ray_offsets, S* rgb, S* depth, S* opacity, S* out_features, S* weights, int64_t n_rays,           \
      int64_t n_samples, int64_t n_channels, int64_t feature_stride, double early_stop_eps, int64_t n_threads) {       \
    const Samples<S> in{sigmas,    t_starts,   t_ends,         rgbs,             features, ray_offsets, n_rays,        \
                        n_samples, n_channels, feature_stride, S(early_stop_eps)};                                     \
    return composite<S>(in, {rgb, depth, opacity, out_features, weights}, n_threads);                                  \
  }                                                                                                                    \
  /* Any cotangent (grad_out_*) and any gradient may be null; grad_sigmas must be there if grad_t_* are. */            \
  PMF_EXPORT int pmf_composite_backward_cpu_##SUFFIX(                                                                  \
      const S* sigmas, const S* t_starts, const S* t_ends, const S* rgbs, const S* features,                           \
      const int64_t* ray_offsets, const S* weights, const S* grad_out_rgb, const S* grad_out_depth,                    \
      const S* grad_out_opacity, const S* grad_out_features, const S* grad_out_weights, S* grad_sigmas,                \
      S* grad_t_starts, S* grad_t_ends, S* grad_rgbs, S* grad_features, int64_t n_rays, int64_t n_samples,             \
      int64_t n_channels, int64_t feature_stride, double early_stop_eps, int64_t n_threads) {                          \
    const Samples<S> in{sigmas,    t_starts,   t_ends,         rgbs,             features, ray_offsets, n_rays,        \
                        n_samples, n_channels, feature_stride, S(early_stop_eps)};                                     \
    return composite_backward<S>(                                                                                      \
        in, weights, {grad_out_rgb, grad_out_depth, grad_out_opacity, grad_out_features, grad_out_weights},            \
        {grad_sigmas, grad_t_starts, grad_t_ends, grad_rgbs, grad_features}, n_threads);                               \
  }

PMF_DEFINE_COMPOSITE(float, f32)
PMF_DEFINE_COMPOSITE(double, f64)
