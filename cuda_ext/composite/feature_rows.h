// Host loops over feature rows: the memory-bound part of compositing.
//
// Rows are handled as vectors of 64 bytes (gcc splits them where registers are narrower). Gradients that are larger
// than the caches are written past them with streaming stores.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX__)
#include <immintrin.h>
#endif

namespace pmf {

constexpr int64_t kVectorBytes = 64;
constexpr int64_t kStreamBytes = int64_t{16} << 20;  // outputs from this size on bypass the caches

template <typename S>
struct Vec {
  typedef S type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(S);
  static inline type load(const S* p) {
    type v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
};

template <bool kStream, typename V>
inline void store(void* target, V value) {
#if defined(__AVX512F__)
  if constexpr (kStream) return _mm512_stream_si512(static_cast<__m512i*>(target), (__m512i)value);
#elif defined(__AVX__)
  if constexpr (kStream) {
    __m256i halves[2];
    std::memcpy(halves, &value, sizeof halves);
    _mm256_stream_si256(static_cast<__m256i*>(target), halves[0]);
    return _mm256_stream_si256(static_cast<__m256i*>(target) + 1, halves[1]);
  }
#endif
  std::memcpy(target, &value, sizeof value);
}

// Streaming stores are not ordered with later ones: fence before another thread may read.
inline void fence_streams() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// out[c] += sum_i weights[i] rows[i][c], four rows at a time: one read and one write of `out` for four rows.
template <typename S>
inline void add_rows(S* __restrict__ out, const S* rows, int64_t stride, const S* weights, int64_t n, int64_t channels) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const S *a = rows + i * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    const S wa = weights[i], wb = weights[i + 1], wc = weights[i + 2], wd = weights[i + 3];
    for (int64_t k = 0; k < channels; ++k) out[k] += (wa * a[k] + wb * b[k]) + (wc * c[k] + wd * d[k]);
  }
  for (; i < n; ++i) {
    const S* a = rows + i * stride;
    const S wa = weights[i];
    for (int64_t k = 0; k < channels; ++k) out[k] += wa * a[k];
  }
}

// One pass over one row: returns <row, cotangent> (if kDot) and writes weight * cotangent to `grad_row` (if kWrite).
// kStream needs `grad_row` aligned to kVectorBytes.
template <typename S, bool kDot, bool kWrite, bool kStream>
inline S gradient_row(const S* row, const S* cotangent, S weight, S* grad_row, int64_t channels) {
  using V = typename Vec<S>::type;
  constexpr int64_t L = Vec<S>::lanes;
  V sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L) {
    for (int u = 0; u < 4; ++u) {
      const V g = Vec<S>::load(cotangent + c + u * L);
      if constexpr (kDot) sums[u] += Vec<S>::load(row + c + u * L) * g;
      if constexpr (kWrite) store<kStream>(grad_row + c + u * L, g * weight);
    }
  }
  for (; c + L <= channels; c += L) {
    const V g = Vec<S>::load(cotangent + c);
    if constexpr (kDot) sums[0] += Vec<S>::load(row + c) * g;
    if constexpr (kWrite) store<kStream>(grad_row + c, g * weight);
  }
  const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  S dot = 0;
  if constexpr (kDot) {
    for (int64_t l = 0; l < L; ++l) dot += sum[l];
  }
  for (; c < channels; ++c) {
    if constexpr (kDot) dot += row[c] * cotangent[c];
    if constexpr (kWrite) grad_row[c] = weight * cotangent[c];
  }
  return dot;
}

}  // namespace pmf
