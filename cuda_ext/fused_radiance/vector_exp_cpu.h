// exp and the logistic function over arrays, float in vector lanes.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../fused_mlp/fused_mlp_tile_cpu.h"

namespace pmf {

typedef int32_t IntVec __attribute__((vector_size(kVectorBytes)));

// 2^n for n in [-126, 127].
inline Vec<float> power_of_two(IntVec n) { return (Vec<float>)((n + 127) << 23); }

// Cephes' expf: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of degree 5 in r; about 1 ulp. Beyond the range of
// float it gives 0 and inf; NaN stays, as it is in r.
inline Vec<float> exp_lanes(Vec<float> x) {
  const Vec<float> low = Vec<float>{} - 104.0f, high = Vec<float>{} + 89.0f, magic = Vec<float>{} + 12582912.0f;
  const Vec<float> inside = x < low ? low : x > high ? high : x;
  const Vec<float> shifted = inside * 1.44269504088896341f + magic;  // its low bits are the nearest integer
  const Vec<float> n = shifted - magic;
  const Vec<float> r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const IntVec power = (IntVec)shifted - (IntVec)magic, half = power >> 1;  // two factors: 2^power may be subnormal
  return (p * r * r + r + 1.0f) * power_of_two(half) * power_of_two(power - half);
}

// values[i] = exp(values[i]) for i < count.
inline void exp_array(float* values, int64_t count) {
  constexpr int64_t lanes = Vector<float>::lanes;
  for (int64_t i = 0; i < count; i += lanes) {
    Vec<float> v{};
    const size_t bytes = sizeof(float) * (count - i < lanes ? count - i : lanes);
    std::memcpy(&v, values + i, bytes);
    v = exp_lanes(v);
    std::memcpy(values + i, &v, bytes);
  }
}

inline void exp_array(double* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = std::exp(values[i]);
}

// values[i] = 1 / (1 + exp(-values[i])).
template <class T>
inline void logistic_array(T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = -values[i];
  exp_array(values, count);
  for (int64_t i = 0; i < count; ++i) values[i] = T(1) / (T(1) + values[i]);
}

}  // namespace pmf
