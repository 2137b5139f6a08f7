// nvcuda::wmma of the host emulation: 16x16x16 tiles of half or bfloat16 with float accumulators.
//
// Every lane holds the whole tile (num_elements is 256 instead of 8), so element-wise code gives each copy the same
// values. On the device the place of an element in a lane is unspecified, and code that relies on one fails here.
// Reads happen before the warp meets, writes are shared out by lane: a missing barrier beside them shows.
#pragma once
#include <cstring>

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment {
  static_assert(M == 16 && N == 16 && K == 16, "the emulation has 16x16x16 tiles");
  static constexpr int num_elements = 256;
  float x[256];  // row-major; exact for half and bfloat16

  fragment() {
    for (float& value : x) value = __builtin_nanf("");  // not filled yet
  }
};

template <class Fragment>
void fill_fragment(Fragment& tile, float value) {
  for (float& element : tile.x) element = value;
  pmf::emulation::warp_barrier(0xffffffffu);
}

template <class Use, class T, class Layout, class Source>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& tile, const Source* from, unsigned stride) {
  constexpr bool by_column = std::is_same_v<Layout, col_major>;
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c)
      tile.x[r * 16 + c] = static_cast<float>(from[by_column ? c * stride + r : r * stride + c]);
  pmf::emulation::warp_barrier(0xffffffffu);
}

inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& tile, const float* from, unsigned stride,
                             layout_t layout) {
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) tile.x[r * 16 + c] = from[layout == mem_col_major ? c * stride + r : r * stride + c];
  pmf::emulation::warp_barrier(0xffffffffu);
}

inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& tile, unsigned stride,
                              layout_t layout) {
  for (int e = pmf::emulation::current().linear % 32; e < 256; e += 32) {
    const int r = e / 16, c = e % 16;
    to[layout == mem_col_major ? c * stride + r : r * stride + c] = tile.x[e];
  }
  pmf::emulation::warp_barrier(0xffffffffu);
}

// Works on its own tiles alone, so the sanitizers, under which it would take most of the time, leave it out.
template <class T, class LayoutA, class LayoutB>
__attribute__((no_sanitize("address", "undefined"), optimize("O3")))
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d, const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
              const fragment<accumulator, 16, 16, 16, float>& c) {
  fragment<accumulator, 16, 16, 16, float> sum = c;
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 16; ++j) sum.x[i * 16 + j] += a.x[i * 16 + k] * b.x[k * 16 + j];
  d = sum;
  pmf::emulation::warp_barrier(0xffffffffu);
}

}  // namespace nvcuda::wmma
