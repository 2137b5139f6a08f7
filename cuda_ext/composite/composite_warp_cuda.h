// Warp-wide pieces of compositing: 32 neighbouring samples of a ray, one to a lane.
#pragma once
#include <cstdint>

#include "launch.h"  // before the maths: it says what a device function is

#include "composite_math.h"

namespace pmf {

template <typename S>
__device__ __forceinline__ S warp_sum(S value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// Product of the values of this lane and of all before it.
template <typename S>
__device__ __forceinline__ S product_up_to(S value, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const S other = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value *= other;
  }
  return value;
}

// Sum of the values of all lanes behind this one. Never total minus own part: that would lose the small sums.
template <typename S>
__device__ __forceinline__ S sum_behind(S value, int lane) {
  S sum = __shfl_down_sync(kFullWarp, value, 1);
  if (lane == kWarp - 1) sum = 0;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const S other = __shfl_down_sync(kFullWarp, sum, step);
    if (lane + step < kWarp) sum += other;
  }
  return sum;
}

// What the lane's sample does to the light, and how many of the warp's samples the light reaches.
template <typename S>
struct LaneLight {
  S weight, after;  // w_i and T_{i+1}
  int kept;         // samples in front of the first with T_i < eps; the same in all lanes
};

// `transmittance` is T in front of the first lane, and becomes T behind the last. Lanes from `count` on hold no sample.
// The rounding of a product depends on its order, so T may rise by an ulp from lane to lane: the first dark sample
// decides, as in the sequential walk, and not each sample for itself.
template <typename S>
__device__ __forceinline__ LaneLight<S> light_of_lanes(S tau, int count, int lane, S early_stop_eps, S* transmittance) {
  const Attenuation<S> medium = attenuation<S>(tau);
  const S product = product_up_to<S>(lane < count ? medium.pass : S(1), lane);
  S in_front = __shfl_up_sync(kFullWarp, product, 1);
  if (lane == 0) in_front = 1;
  const S before = *transmittance * in_front, after = *transmittance * product;
  const unsigned dark = __ballot_sync(kFullWarp, lane < count && before < early_stop_eps);
  *transmittance = __shfl_sync(kFullWarp, after, kWarp - 1);
  return {before * medium.alpha, after, dark == 0 ? count : __ffs(static_cast<int>(dark)) - 1};
}

}  // namespace pmf
