// The part of the first layer that is the same for all samples of a ray.
//
// With rows [x_i, e_ray(i)] the first layer is W_x x_i + W_e e_ray(i): the second term is computed once per ray and
// added to each of its rows, so a ray with 20 samples pays for its direction and appearance once.
// Backwards, with z_i the gradient of the first layer's output and s_ray the sum of z_i over the ray's rows:
//   grad W_e = sum_ray s_ray e_ray^T,    grad e_ray = W_e^T s_ray
#pragma once
#include <algorithm>
#include <cstdint>

#include "abi.h"
#include "fused_mlp_scratch_cpu.h"
#include "fused_mlp_tile_cpu.h"

namespace pmf {

constexpr int64_t kRayBlock = 480;  // rays per task; a multiple of the row tiles

// Per-ray inputs: e (n_rays, width) row-major, `index` names the ray of each row and is sorted.
template <class T>
struct RayInput {
  const T* data;
  int64_t width;
  const int64_t* index;
  int64_t n_rays;

  bool valid(int64_t n) const {
    bool sorted = true;
    for (int64_t r = 1; r < n; ++r) sorted &= index[r - 1] <= index[r];
    return sorted && (n == 0 || (index[0] >= 0 && index[n - 1] < n_rays));
  }
};

// W_e as both products need it, and e padded to whole vectors.
template <class T>
class RayLayer {
 public:
  // `weight` is W_0, (n_out, in_width + rays.width) row-major; W_e are its last columns. Rays [first, last] are used.
  RayLayer(const RayInput<T>& rays, const T* weight, int64_t n_out, int64_t x_width, int64_t n)
      : rays_(rays), n_out_(n_out), out_width_(padded<T>(n_out)), e_width_(padded<T>(rays.width)),
        first_(n > 0 ? rays.index[0] : 0), count_(n > 0 ? rays.index[n - 1] + 1 - first_ : 0),
        transposed_(rays.width * out_width_), plain_(n_out * e_width_) {
    for (int64_t o = 0; o < n_out; ++o)
      for (int64_t i = 0; i < rays.width; ++i) {
        const T w = weight[o * (x_width + rays.width) + x_width + i];
        transposed_.get()[i * out_width_ + o] = w;
        plain_.get()[o * e_width_ + i] = w;
      }
  }
  int64_t out_width() const { return out_width_; }
  int64_t first() const { return first_; }
  int64_t count() const { return count_; }

  // terms (count, out_width): W_e e of rays first .. first + count.
  void terms(T* out, int64_t n_threads) const {
    const int64_t n_tasks = (count_ + kRayBlock - 1) / kRayBlock;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (count_ > PMF_MIN_PARALLEL)
    for (int64_t task = 0; task < n_tasks; ++task) {
      const int64_t row = task * kRayBlock, rows = std::min(kRayBlock, count_ - row);
      multiply<true, Store::kPlain>(Product<T>{rays_.data + (first_ + row) * rays_.width, rays_.width, 1,
                                               transposed_.get(), out_width_, out + row * out_width_, out_width_,
                                               nullptr, rows, out_width_, rays_.width});
    }
  }

  // grad_e (n_rays, width) of the ray sums s (count, out_width); rays without rows get 0.
  void input_gradient(const T* sums, T* grad, int64_t n_threads) const {
    std::fill(grad, grad + rays_.n_rays * rays_.width, T(0));
    const int64_t n_tasks = (count_ + kRayBlock - 1) / kRayBlock;
    Scratch<T> local(kRayBlock * e_width_ * std::max<int64_t>(n_tasks, 1));
#pragma omp parallel for schedule(static) num_threads(n_threads) if (count_ > PMF_MIN_PARALLEL)
    for (int64_t task = 0; task < n_tasks; ++task) {
      const int64_t row = task * kRayBlock, rows = std::min(kRayBlock, count_ - row);
      T* out = local.get() + row * e_width_;
      multiply<true, Store::kPlain>(Product<T>{sums + row * out_width_, out_width_, 1, plain_.get(), e_width_, out,
                                               e_width_, nullptr, rows, e_width_, n_out_});
      for (int64_t r = 0; r < rows; ++r)
        std::copy(out + r * e_width_, out + r * e_width_ + rays_.width, grad + (first_ + row + r) * rays_.width);
    }
  }

  // Columns [x_width, x_width + width) of grad_weight (n_out, x_width + width). A task owns output rows.
  void weight_gradient(const T* sums, int64_t x_width, T* grad_weight, int64_t n_threads) const {
    Scratch<T> e(count_ * e_width_), result(n_out_ * e_width_);
    for (int64_t r = 0; r < count_; ++r)
      std::copy(rays_.data + (first_ + r) * rays_.width, rays_.data + (first_ + r + 1) * rays_.width,
                e.get() + r * e_width_);
    constexpr int64_t kRows = 8;
    const int64_t n_tasks = (n_out_ + kRows - 1) / kRows;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (count_ * n_out_ > 16 * PMF_MIN_PARALLEL)
    for (int64_t task = 0; task < n_tasks; ++task) {
      const int64_t row = task * kRows, rows = std::min(kRows, n_out_ - row);
      multiply<false, Store::kAdd>(Product<T>{sums + row, 1, out_width_, e.get(), e_width_,
                                              result.get() + row * e_width_, e_width_, nullptr, rows, e_width_,
                                              count_});
    }
    for (int64_t o = 0; o < n_out_; ++o)
      std::copy(result.get() + o * e_width_, result.get() + o * e_width_ + rays_.width,
                grad_weight + o * (x_width + rays_.width) + x_width);
  }

 private:
  RayInput<T> rays_;
  int64_t n_out_, out_width_, e_width_, first_, count_;
  Scratch<T> transposed_, plain_;
};

// Sums rows of z by ray. Rays are sorted, so within a chunk of rows only the first ray can have begun in an earlier
// chunk: its sum goes to the chunk's own `head`, which is added after all chunks, in their order.
template <class T>
struct RaySums {
  const int64_t* index;
  int64_t first, width, chunk_size;
  T *sums, *heads;  // (count, width) and (n_chunks, width), zeroed

  void add(int64_t chunk_begin, int64_t row, int64_t count, const T* z) const {
    constexpr int64_t lanes = Vector<T>::lanes;
    const bool continues = chunk_begin > 0 && index[chunk_begin] == index[chunk_begin - 1];
    for (int64_t r = 0; r < count;) {
      const int64_t ray = index[row + r];
      const bool is_head = continues && ray == index[chunk_begin];
      T* sum = is_head ? heads + chunk_begin / chunk_size * width : sums + (ray - first) * width;
      int64_t end = r + 1;
      while (end < count && index[row + end] == ray) ++end;
      for (int64_t c = 0; c < width; c += lanes) {
        Vec<T> total = *reinterpret_cast<const Vec<T>*>(sum + c);
        for (int64_t i = r; i < end; ++i) total += *reinterpret_cast<const Vec<T>*>(z + i * width + c);
        *reinterpret_cast<Vec<T>*>(sum + c) = total;
      }
      r = end;
    }
  }
  void finish(int64_t n) const {
    for (int64_t begin = chunk_size; begin < n; begin += chunk_size)
      for (int64_t i = 0; i < width; ++i)
        sums[(index[begin] - first) * width + i] += heads[begin / chunk_size * width + i];
  }
};

}  // namespace pmf
