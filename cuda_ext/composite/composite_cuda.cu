// Compositing of packed samples on the GPU: a warp per ray, four rays to a block.
//
// Forward: 32 samples at a time, one to a lane; a warp scan of what passes each sample gives the transmittances, a
// ballot finds the early stop. Then the lanes turn to the channels: for each kept sample its weight is broadcast and
// 32 neighbouring channels are read at once, so a feature row is read once, in whole sectors, whatever C is.
// Backward: a first walk leaves T_{i+1} where the gradient of sigma will be; a second one goes through the ray's chunks
// of 32 from the last kept one to the first. The score of a sample needs <features_i, cotangent>, a sum over lanes:
// the sums of eight samples are folded together (10 shuffles instead of 40), while the gradient rows are written. What
// lies behind a sample comes from a suffix scan, so that no difference of two large sums is ever taken.
// All sums of a ray are taken by one warp in a fixed order: no atomics, and results are repeatable. Samples behind the
// early stop are not read. A lane meets the same samples in every walk, so what it left in memory is its own.
#include "composite_warp_cuda.h"

namespace {

using namespace pmf;

constexpr int kThreads = 128, kRaysPerBlock = kThreads / kWarp;
constexpr int kFold = 8;  // samples whose channel sums are folded together

template <typename S>
struct Samples {
  const S *sigmas, *t_starts, *t_ends, *rgbs, *features;
  const int64_t* ray_offsets;
  int64_t n_rays, n_channels, feature_stride;
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

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }

__device__ __forceinline__ int64_t ray_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kRaysPerBlock + threadIdx.x / kWarp;
}

template <typename S>
__device__ __forceinline__ void fill_zero(S* data, int64_t first, int64_t last) {
  for (int64_t i = first + lane_id(); i < last; i += kWarp) data[i] = 0;
}

template <typename S>
__device__ __forceinline__ int chunk_size(int64_t base, int64_t last) {
  return static_cast<int>(last - base < kWarp ? last - base : kWarp);
}

// Walks the samples [first, last) in chunks of 32 until the light is used up.
// Calls visit(i, weight, transmittance_after) in the lane of every kept sample; returns one past the last kept sample.
template <typename S, typename Visit>
__device__ __forceinline__ int64_t walk(const Samples<S>& in, int64_t first, int64_t last, Visit visit) {
  S transmittance = 1;
  for (int64_t base = first; base < last; base += kWarp) {
    const int lane = lane_id(), count = chunk_size<S>(base, last);
    const int64_t i = base + lane;
    const S tau = lane < count ? in.sigmas[i] * (in.t_ends[i] - in.t_starts[i]) : S(0);
    const LaneLight<S> light = light_of_lanes<S>(tau, count, lane, in.early_stop_eps, &transmittance);
    if (lane < light.kept) visit(i, light.weight, light.after);
    if (light.kept < count) return base + light.kept;
  }
  return last;
}

// Adds up channels [channel, channel + 32 K) of the rows [first, kept).
template <typename S, int K>
__device__ __forceinline__ void sum_channels(const Samples<S>& in, const S* weights, int64_t first, int64_t kept,
                                             int64_t channel, S* out) {
  const int lane = lane_id();
  S sum[K] = {};
  for (int64_t base = first; base < kept; base += kWarp) {
    const int count = chunk_size<S>(base, kept);
    const S weight = lane < count ? weights[base + lane] : S(0);
    const S* row = in.features + base * in.feature_stride + channel + lane;
#pragma unroll 8
    for (int j = 0; j < count; ++j, row += in.feature_stride) {
      const S w = __shfl_sync(kFullWarp, weight, j);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (channel + k * kWarp + lane < in.n_channels) sum[k] += w * row[k * kWarp];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (channel + k * kWarp + lane < in.n_channels) out[channel + k * kWarp + lane] = sum[k];
  }
}

template <typename S, int K>
__global__ void __launch_bounds__(kThreads, 4) composite_kernel(Samples<S> in, Outputs<S> out) {
  const int64_t ray = ray_of_warp();
  if (ray >= in.n_rays) return;
  const int64_t first = in.ray_offsets[ray], last = in.ray_offsets[ray + 1];
  S red = 0, green = 0, blue = 0, depth = 0, opacity = 0;
  const int64_t kept = walk<S>(in, first, last, [&](int64_t i, S weight, S) {
    out.weights[i] = weight;
    red += weight * in.rgbs[3 * i];
    green += weight * in.rgbs[3 * i + 1];
    blue += weight * in.rgbs[3 * i + 2];
    depth += weight * (S(0.5) * (in.t_starts[i] + in.t_ends[i]));
    opacity += weight;
  });
  fill_zero(out.weights, kept, last);
  red = warp_sum(red), green = warp_sum(green), blue = warp_sum(blue);
  depth = warp_sum(depth), opacity = warp_sum(opacity);
  if (lane_id() == 0) {
    out.rgb[3 * ray] = red;
    out.rgb[3 * ray + 1] = green;
    out.rgb[3 * ray + 2] = blue;
    out.depth[ray] = depth;
    out.opacity[ray] = opacity;
  }
  for (int64_t channel = 0; channel < in.n_channels; channel += K * kWarp)
    sum_channels<S, K>(in, out.weights, first, kept, channel, out.features + ray * in.n_channels);
}

// Channel sums of eight samples, each spread over the lanes, to the total of sample (lane / 4) in every lane.
template <typename S>
__device__ __forceinline__ S fold(S* partial, int lane) {
#pragma unroll
  for (int half = kFold / 2, step = kWarp / 2; half > 0; half /= 2, step /= 2) {
    const bool is_upper = (lane & step) != 0;
#pragma unroll
    for (int s = 0; s < half; ++s) {
      const S given = is_upper ? partial[s] : partial[s + half];
      partial[s] = (is_upper ? partial[s + half] : partial[s]) + __shfl_xor_sync(kFullWarp, given, step);
    }
  }
  S total = partial[0];
#pragma unroll
  for (int step = kWarp / kFold / 2; step > 0; step /= 2) total += __shfl_xor_sync(kFullWarp, total, step);
  return total;
}

// Channels [channel, channel + 32 K) of the `count` rows from `base`: returns the lane's part of <row, cotangent>
// (if kDot) and writes weight * cotangent (if kWrite). `cotangent` is the ray's, `weight` that of the lane's sample.
template <typename S, int K, bool kDot, bool kWrite>
__device__ __forceinline__ S gradient_channels(const Samples<S>& in, const S* __restrict__ cotangent, S weight,
                                               int64_t base, int count, int64_t channel, S* __restrict__ grad) {
  const int lane = lane_id();
  S g[K], dot = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t c = channel + k * kWarp + lane;
    g[k] = c < in.n_channels ? cotangent[c] : S(0);
  }
  for (int group = 0; group < count; group += kFold) {
    S partial[kFold] = {};
#pragma unroll
    for (int s = 0; s < kFold; ++s) {
      const int64_t row = base + group + s;
      const S w = __shfl_sync(kFullWarp, weight, (group + s) % kWarp);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const int64_t c = channel + k * kWarp + lane;
        if (group + s >= count || c >= in.n_channels) continue;
        if constexpr (kDot) partial[s] += in.features[row * in.feature_stride + c] * g[k];
        if constexpr (kWrite) grad[row * in.n_channels + c] = w * g[k];
      }
    }
    if constexpr (kDot) {
      const S total = fold<S>(partial, lane);
      const S mine = __shfl_sync(kFullWarp, total, lane % kFold * (kWarp / kFold));
      if (lane / kFold == group / kFold) dot = mine;
    }
  }
  return dot;
}

template <typename S>
__device__ __forceinline__ void clear_dropped(const Gradients<S>& grad, int64_t kept, int64_t last, int64_t channels) {
  if (grad.sigmas != nullptr) fill_zero(grad.sigmas, kept, last);
  if (grad.t_starts != nullptr) fill_zero(grad.t_starts, kept, last);
  if (grad.t_ends != nullptr) fill_zero(grad.t_ends, kept, last);
  if (grad.rgbs != nullptr) fill_zero(grad.rgbs, 3 * kept, 3 * last);
  if (grad.features != nullptr) fill_zero(grad.features, kept * channels, last * channels);
}

template <typename S, int K, bool kDot, bool kWrite>
__global__ void __launch_bounds__(kThreads, 4)
    composite_backward_kernel(Samples<S> in, const S* __restrict__ weights, Cotangents<S> cot, Gradients<S> grad) {
  const int64_t ray = ray_of_warp();
  if (ray >= in.n_rays) return;
  const int lane = lane_id();
  const int64_t first = in.ray_offsets[ray], last = in.ray_offsets[ray + 1];
  const bool is_density_wanted = grad.sigmas != nullptr;
  int64_t kept = last;
  if (is_density_wanted) kept = walk<S>(in, first, last, [&](int64_t i, S, S after) { grad.sigmas[i] = after; });
  clear_dropped(grad, kept, last, in.n_channels);
  S rgb[3] = {0, 0, 0};
  for (int c = 0; c < 3; ++c) {
    if (cot.rgb != nullptr) rgb[c] = cot.rgb[3 * ray + c];
  }
  const S depth = cot.depth != nullptr ? cot.depth[ray] : S(0);
  const S opacity = cot.opacity != nullptr ? cot.opacity[ray] : S(0);
  S behind = 0;  // sum of w_j s_j over the chunks behind this one
  for (int64_t base = first + (kept - first - 1) / kWarp * kWarp; base >= first && kept > first; base -= kWarp) {
    const int count = chunk_size<S>(base, kept);
    const int64_t i = base + lane;
    const bool is_mine = lane < count;
    const S weight = is_mine ? weights[i] : S(0);
    S score = opacity + (is_mine && cot.weights != nullptr ? cot.weights[i] : S(0));
    if constexpr (kDot || kWrite) {
      const S* cotangent = cot.features + ray * in.n_channels;
      for (int64_t channel = 0; channel < in.n_channels; channel += K * kWarp)
        score += gradient_channels<S, K, kDot, kWrite>(in, cotangent, weight, base, count, channel, grad.features);
    }
    if (is_mine && grad.rgbs != nullptr) {
      for (int c = 0; c < 3; ++c) grad.rgbs[3 * i + c] = weight * rgb[c];
    }
    if (!is_density_wanted) continue;
    S start = 0, end = 0;
    if (is_mine) {
      start = in.t_starts[i], end = in.t_ends[i];
      for (int c = 0; c < 3; ++c) score += rgb[c] * in.rgbs[3 * i + c];
      score += depth * (S(0.5) * (start + end));
    }
    const S part = is_mine ? weight * score : S(0);
    const S all_behind = behind + sum_behind<S>(part, lane);
    behind = __shfl_sync(kFullWarp, all_behind + part, 0);
    if (!is_mine) continue;
    const S grad_tau = grad.sigmas[i] * score - all_behind;
    const S along = grad_tau * in.sigmas[i], middle = S(0.5) * weight * depth;
    grad.sigmas[i] = grad_tau * (end - start);
    if (grad.t_starts != nullptr) grad.t_starts[i] = middle - along;
    if (grad.t_ends != nullptr) grad.t_ends[i] = middle + along;
  }
}

template <typename S>
int composite(const Samples<S>& in, const Outputs<S>& out, void* stream) {
  const unsigned blocks = blocks_for(in.n_rays, kRaysPerBlock);
  if (in.n_channels <= kWarp) return PMF_LAUNCH((composite_kernel<S, 1>), blocks, kThreads, 0, stream, in, out);
  return PMF_LAUNCH((composite_kernel<S, 2>), blocks, kThreads, 0, stream, in, out);
}

template <typename S, int K>
int composite_backward(const Samples<S>& in, const S* weights, const Cotangents<S>& cot, const Gradients<S>& grad,
                       void* stream) {
  const bool has_features = cot.features != nullptr && in.n_channels > 0;
  const bool dot = has_features && grad.sigmas != nullptr, write = has_features && grad.features != nullptr;
  const auto run = [&](auto kernel) {
    return PMF_LAUNCH((kernel), blocks_for(in.n_rays, kRaysPerBlock), kThreads, 0, stream, in, weights, cot, grad);
  };
  if (dot && write) return run(composite_backward_kernel<S, K, true, true>);
  if (dot) return run(composite_backward_kernel<S, K, true, false>);
  if (write) return run(composite_backward_kernel<S, K, false, true>);
  return run(composite_backward_kernel<S, 1, false, false>);
}

}  // namespace

// As the CPU functions (composite_cpu.cpp), with device pointers and a stream.
#define PMF_DEFINE_COMPOSITE(S, SUFFIX)                                                                                \
  PMF_EXPORT int pmf_composite_cuda_##SUFFIX(                                                                          \
      const S* sigmas, const S* t_starts, const S* t_ends, const S* rgbs, const S* features,                           \
      const int64_t* ray_offsets, S* rgb, S* depth, S* opacity, S* out_features, S* weights, int64_t n_rays,           \
      int64_t /*n_samples*/, int64_t n_channels, int64_t feature_stride, double early_stop_eps, void* stream) {        \
    const Samples<S> in{sigmas, t_starts,   t_ends,         rgbs,             features, ray_offsets,                   \
                        n_rays, n_channels, feature_stride, S(early_stop_eps)};                                        \
    return composite<S>(in, {rgb, depth, opacity, out_features, weights}, stream);                                     \
  }                                                                                                                    \
  /* Any cotangent (grad_out_*) and any gradient may be null; grad_sigmas must be there if grad_t_* are. */            \
  PMF_EXPORT int pmf_composite_backward_cuda_##SUFFIX(                                                                 \
      const S* sigmas, const S* t_starts, const S* t_ends, const S* rgbs, const S* features,                           \
      const int64_t* ray_offsets, const S* weights, const S* grad_out_rgb, const S* grad_out_depth,                    \
      const S* grad_out_opacity, const S* grad_out_features, const S* grad_out_weights, S* grad_sigmas,                \
      S* grad_t_starts, S* grad_t_ends, S* grad_rgbs, S* grad_features, int64_t n_rays, int64_t /*n_samples*/,         \
      int64_t n_channels, int64_t feature_stride, double early_stop_eps, void* stream) {                               \
    const Samples<S> in{sigmas, t_starts,   t_ends,         rgbs,             features, ray_offsets,                   \
                        n_rays, n_channels, feature_stride, S(early_stop_eps)};                                        \
    const Cotangents<S> cot{grad_out_rgb, grad_out_depth, grad_out_opacity, grad_out_features, grad_out_weights};      \
    const Gradients<S> grad{grad_sigmas, grad_t_starts, grad_t_ends, grad_rgbs, grad_features};                        \
    return n_channels <= kWarp ? composite_backward<S, 1>(in, weights, cot, grad, stream)                              \
                               : composite_backward<S, 2>(in, weights, cot, grad, stream);                             \
  }

PMF_DEFINE_COMPOSITE(float, f32)
PMF_DEFINE_COMPOSITE(double, f64)
