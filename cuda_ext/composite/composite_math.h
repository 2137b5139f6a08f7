// Per-sample maths of emission-absorption compositing (Eq. 3, Mildenhall et al. 2020), shared by host and device.
//
//   tau_i = sigma_i (t_end_i - t_start_i)      alpha_i = 1 - exp(-tau_i)
//   T_i = prod_{j<i} exp(-tau_j)               w_i = T_i alpha_i
//   d(sum_j w_j s_j) / d tau_i = T_{i+1} s_i - sum_{j>i} w_j s_j
//
// A sample whose T_i is below the early-stop threshold has w_i = 0, and so have all behind it.
#pragma once
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace pmf {

// What a piece of medium does to light: `alpha` is absorbed, `pass` = 1 - alpha goes through. Both are computed from
// expm1(-tau), so that alpha keeps its digits for thin samples and pass keeps its digits for thick ones.
template <typename S>
struct Attenuation {
  S alpha;
  S pass;
};

template <typename S>
PMF_HD Attenuation<S> attenuation(S tau);

template <>
PMF_HD Attenuation<double> attenuation<double>(double tau) {
  return {-std::expm1(-tau), std::exp(-tau)};
}

// Branch-free, so that a loop over samples vectorises: -tau = k ln 2 + r, expm1(r) by its series (|r| <= ln 2 / 2, the
// first dropped term is below half an ulp), expm1(-tau) = 2^k expm1(r) + (2^k - 1). NaN goes in and comes out.
template <>
PMF_HD Attenuation<float> attenuation<float>(float tau) {
  float y = -tau;
  y = y < -88.0f ? -88.0f : y;
  y = y > 88.0f ? 88.0f : y;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const float shifted = y * 1.44269504f + shift;
  const float k = shifted - shift;
  const float r = (y - k * 0.693145752f) - k * 1.42860677e-6f;  // ln 2 in two parts: k times the first is exact
  uint32_t bits;  // unsigned: with NaN the shift overflows
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000u + 127u) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  float series = 1.98412698e-4f;
  series = series * r + 1.38888889e-3f;
  series = series * r + 8.33333333e-3f;
  series = series * r + 4.16666667e-2f;
  series = series * r + 1.66666667e-1f;
  series = series * r + 0.5f;
  series = series * r * r + r;
  const float pass = power * series + power;
  return {-(power * series + (power - 1.0f)), tau > 87.0f ? 0.0f : pass};
}

// Loss gradient of one sample, walking a ray from its last sample to its first.
template <typename S>
struct DensityGradient {
  S behind = 0;  // sum over the samples behind this one of w_j s_j

  // `score` is s_i, the derivative of the loss in w_i; returns the derivative in tau_i.
  PMF_HD S step(S weight, S transmittance_after, S score) {
    const S grad_tau = transmittance_after * score - behind;
    behind += weight * score;
    return grad_tau;
  }
};

}  // namespace pmf
