// One bias-free ReLU network over blocks of points: its layout, its packed weights, a block's way forward and back.
//
// A block of kBlock points runs through all layers in scratch memory. The backward keeps nothing from the forward:
// it recomputes the hidden layers of its block (a third more arithmetic, no activation traffic), then walks the
// layers from last to first. Weights are packed once per call: transposed for the forward product, plain for the
// input gradient, rows padded to whole vectors.
//
// A row of the input may be two parts side by side, so that nobody has to write them beside each other: x, and either
// a row of `extra` (loaded into the block behind x) or, with an index, the features of the row's ray
// (fused_mlp_rays_cpu.h: a term of the first layer that is computed once per ray).
//
// Repeatable: sums over rows (weight gradient, gradient of a ray) are taken per chunk of points, chunks depend on n
// alone, and the partial sums are added in chunk order, so the result does not depend on the number of threads or on
// their timing. NaN and inf stay in their row of the output and of dx; no sum over padding ever reaches a result.
#pragma once
#include <algorithm>
#include <new>
#include <optional>
#include <vector>

#include "abi.h"
#include "fused_mlp_block_cpu.h"
#include "fused_mlp_rays_cpu.h"
#include "fused_mlp_scratch_cpu.h"
#include "fused_mlp_tile_cpu.h"

namespace pmf {

constexpr int kOutOfMemory = 2, kBadIndex = 3;  // status
constexpr int64_t kBlock = 96;      // points; a multiple of every row tile and vector width
constexpr int64_t kMinChunk = 480;  // points summed into one partial weight gradient, at least
constexpr int64_t kMaxChunks = 64;  // bound on the memory of the partial gradients

// What the network is given; `extra` (n, extra_width) row-major is null without a second part or with a per-ray one.
template <class T>
struct Input {
  Matrix<const T> x;
  const T* extra;
  int64_t extra_width;
  RayInput<T> rays;  // width 0: none

  Input(Matrix<const T> x_, const T* extra_, int64_t width, const int64_t* index, int64_t n_extra)
      : x(x_), extra(index == nullptr ? extra_ : nullptr), extra_width(index == nullptr ? width : 0),
        rays{extra_, index == nullptr ? 0 : width, index, n_extra} {}
  bool has_rays() const { return rays.index != nullptr; }
};

// Sizes and places that follow from the layer dimensions.
template <class T>
struct Layout {
  std::vector<int64_t> dims;        // dims[0]: columns of the block, without the per-ray part
  int64_t n_layers, ray_width;
  int64_t widest = 0;               // padded width of the widest activation
  std::vector<int64_t> params_at;   // W of layer l in the parameter vector
  std::vector<int64_t> forward_at;  // W^T of layer l: (dims[l], padded(dims[l+1]))
  std::vector<int64_t> plain_at;    // W of layer l: (dims[l+1], padded(dims[l])); also the gradient's layout

  Layout(const int64_t* all_dims, int64_t n_layers_, int64_t ray_width_)
      : dims(all_dims, all_dims + n_layers_ + 1), n_layers(n_layers_), ray_width(ray_width_), forward_at{0},
        plain_at{0} {
    dims[0] -= ray_width;
    for (int64_t l = 0; l <= n_layers; ++l) widest = std::max(widest, width(l));
    for (int64_t l = 0; l < n_layers; ++l) {
      params_at.push_back(layer_offset(all_dims, l));
      forward_at.push_back(forward_at[l] + dims[l] * width(l + 1));
      plain_at.push_back(plain_at[l] + dims[l + 1] * width(l));
    }
  }
  int64_t width(int64_t l) const { return padded<T>(dims[l]); }
  int64_t params_row(int64_t l) const { return dims[l] + (l == 0 ? ray_width : 0); }
};

template <class T>
void pack_weights(const Layout<T>& layout, const T* params, T* forward, T* plain) {
  for (int64_t l = 0; l < layout.n_layers; ++l) {
    const int64_t n_in = layout.dims[l], n_out = layout.dims[l + 1];
    for (int64_t o = 0; o < n_out; ++o) {
      const T* row = params + layout.params_at[l] + o * layout.params_row(l);
      for (int64_t i = 0; i < n_in; ++i) {
        forward[layout.forward_at[l] + i * layout.width(l + 1) + o] = row[i];
        if (plain != nullptr) plain[layout.plain_at[l] + o * layout.width(l) + i] = row[i];
      }
    }
  }
}

// The first layer's per-ray terms, computed at the start of a call; empty without rays.
template <class T>
struct RayTerms {
  std::optional<RayLayer<T>> layer;
  std::optional<Scratch<T>> terms;

  RayTerms(const Layout<T>& layout, const Input<T>& input, const T* params, int64_t n, int64_t n_threads) {
    if (!input.has_rays()) return;
    layer.emplace(input.rays, params, layout.dims[1], layout.dims[0], n);
    terms.emplace(layer->count() * layer->out_width());
    layer->terms(terms->get(), n_threads);
  }
};

// Rows of a block and the layers they run through.
template <class T>
struct Block {
  const Layout<T>& layout;
  const Input<T>& input;
  const RayTerms<T>& rays;
  const T* weights;  // packed for the forward product

  // Rows [row, row + count) of the input, where they lie or in `local`.
  const T* load(int64_t row, int64_t count, T* local) const {
    const int64_t ld = layout.width(0), width = input.extra_width, x_width = layout.dims[0] - width;
    if (width == 0) return block_of(input.x, row, count, x_width, local, ld);
    load_block(input.x, row, count, x_width, local, ld);  // may write padding, so the second part follows
    for (int64_t r = 0; r < count; ++r)
      std::copy_n(input.extra + (row + r) * width, width, local + r * ld + x_width);
    return local;
  }

  // Layer l on a block: `in` (count, width(l)) -> `out` (count, width(l+1)); ReLU after all but the last layer.
  void forward_layer(int64_t l, int64_t row, int64_t count, const T* in, T* out) const {
    const int64_t in_width = layout.width(l), out_width = layout.width(l + 1);
    Product<T> product{in,  in_width,  1,       weights + layout.forward_at[l], out_width,     out,
                       out_width, nullptr, count,   out_width,                      layout.dims[l]};
    if (l == 0 && rays.layer) {
      product.add = rays.terms->get() - rays.layer->first() * out_width;
      product.add_index = input.rays.index + row;
    }
    if (l + 1 < layout.n_layers)
      multiply<true, Store::kRelu>(product);
    else
      multiply<true, Store::kPlain>(product);
  }

  // All layers on the rows `now`, through two buffers in turn, of which `other` may hold these rows; the output goes to
  // `last` where that is not null. Returns where it lies; `next` is free then.
  const T* run(int64_t row, int64_t count, const T* now, T*& next, T*& other, T* last = nullptr) const {
    for (int64_t l = 0; l < layout.n_layers; ++l, std::swap(next, other)) {
      T* out = last != nullptr && l + 1 == layout.n_layers ? last : next;
      forward_layer(l, row, count, now, out);
      now = out;
    }
    return now;
  }

  // Hidden activations of a block with the input rows `in`: layer l's output at scratch + (l + 1) * buffer.
  void hidden(int64_t row, int64_t count, const T* in, T* scratch) const {
    const int64_t buffer = kBlock * layout.widest;
    for (int64_t l = 0; l + 1 < layout.n_layers; ++l, in = scratch + l * buffer)
      forward_layer(l, row, count, in, scratch + (l + 1) * buffer);
  }
};

// How the rows are cut for sums that must not depend on the number of threads.
struct Chunks {
  int64_t size, count;

  explicit Chunks(int64_t n) {
    const int64_t wanted = std::max(kMinChunk, (n + kMaxChunks - 1) / kMaxChunks);
    size = (wanted + kBlock - 1) / kBlock * kBlock;
    count = (n + size - 1) / size;
  }
};

// One network's backward: weights packed for it, per-chunk sums of its parameters' and of its rays' gradients.
template <class T>
class Backward {
 public:
  // `wants_params`, `wants_rays`: whether the gradients of the parameters, of the rays' features are needed.
  Backward(const Layout<T>& layout, const Input<T>& input, const T* params, int64_t n, const Chunks& chunks,
           bool wants_params, bool wants_rays, int64_t n_threads)
      : layout_(layout), chunks_(chunks), forward_(layout.forward_at.back()), plain_(layout.plain_at.back()),
        partials_(wants_params ? layout.plain_at.back() * chunks.count : 0), wants_params_(wants_params),
        has_ray_sums_(input.has_rays() && (wants_rays || wants_params)),
        rays_(layout, input, params, n, n_threads), sum_width_(has_ray_sums_ ? layout.width(1) : 0),
        sums_(has_ray_sums_ ? rays_.layer->count() * sum_width_ : 0), heads_(chunks.count * sum_width_),
        ray_sums_{input.rays.index, has_ray_sums_ ? rays_.layer->first() : 0, sum_width_, chunks.size, sums_.get(),
                  heads_.get()},
        block_{layout, input, rays_, forward_.get()} {
    pack_weights(layout, params, forward_.get(), plain_.get());
  }
  Backward(const Backward&) = delete;
  Backward& operator=(const Backward&) = delete;

  const Block<T>& block() const { return block_; }
  // Scratch of a thread: input and activations of all layers, then two gradients.
  static int64_t scratch_size(const Layout<T>& layout) { return (layout.n_layers + 2) * kBlock * layout.widest; }
  // A place for the gradient of the network's output; row stride width(n_layers).
  T* output_gradient(T* scratch) const { return scratch + layout_.n_layers * kBlock * layout_.widest; }

  // From the input rows `in`, the output's gradient z and the activations in `scratch` to the gradient of the first
  // layer's output, which is returned; *free_buffer then has room for another gradient. Adds to the sums of the chunk
  // that begins at row `chunk_begin`.
  const T* layers(int64_t chunk_begin, int64_t row, int64_t count, const T* in, const T* z, T* scratch,
                  T** free_buffer) const {
    const int64_t buffer = kBlock * layout_.widest;
    T* partial = wants_params_ ? partials_.get() + chunk_begin / chunks_.size * layout_.plain_at.back() : nullptr;
    T *next = output_gradient(scratch), *other = next + buffer;
    if (z == next) std::swap(next, other);
    for (int64_t l = layout_.n_layers - 1; l >= 0; --l) {
      const T* h = l == 0 ? in : scratch + l * buffer;
      const int64_t n_out = layout_.dims[l + 1], in_width = layout_.width(l), out_width = layout_.width(l + 1);
      if (partial != nullptr)
        multiply<false, Store::kAdd>(Product<T>{z, 1, out_width, h, in_width, partial + layout_.plain_at[l],
                                                in_width, nullptr, n_out, in_width, count});
      if (l == 0) break;
      multiply<true, Store::kGate>(Product<T>{z, out_width, 1, plain_.get() + layout_.plain_at[l], in_width, next,
                                              in_width, h, count, in_width, n_out});
      z = next;
      std::swap(next, other);
    }
    if (has_ray_sums_) ray_sums_.add(chunk_begin, row, count, z);
    *free_buffer = next;
    return z;
  }

  // Gradient of the block's first `cols` input columns from that of the first layer's output; rows of width(0), of
  // which whole vectors are written.
  void input_gradient(int64_t count, const T* z, int64_t cols, T* result) const {
    multiply<true, Store::kPlain>(Product<T>{z, layout_.width(1), 1, plain_.get(), layout_.width(0), result,
                                             layout_.width(0), nullptr, count, padded<T>(cols), layout_.dims[1]});
  }

  // After all chunks: adds what they summed, in their order. Either gradient may be null.
  void finish(int64_t n, T* grad_params, T* grad_rays, int64_t n_threads) const {
    if (grad_params != nullptr) reduce(grad_params);
    if (!has_ray_sums_) return;
    ray_sums_.finish(n);
    if (grad_rays != nullptr) rays_.layer->input_gradient(sums_.get(), grad_rays, n_threads);
    if (grad_params != nullptr) rays_.layer->weight_gradient(sums_.get(), layout_.dims[0], grad_params, n_threads);
  }

 private:
  void reduce(T* grad_params) const {  // drops the padding
    for (int64_t l = 0; l < layout_.n_layers; ++l) {
      const int64_t n_in = layout_.dims[l], n_out = layout_.dims[l + 1];
      for (int64_t o = 0; o < n_out; ++o) {
        T* row = grad_params + layout_.params_at[l] + o * layout_.params_row(l);
        std::fill(row, row + n_in, T(0));
        for (int64_t chunk = 0; chunk < chunks_.count; ++chunk) {
          const T* part =
              partials_.get() + chunk * layout_.plain_at.back() + layout_.plain_at[l] + o * layout_.width(l);
          for (int64_t i = 0; i < n_in; ++i) row[i] += part[i];
        }
      }
    }
  }

  const Layout<T>& layout_;
  const Chunks& chunks_;
  Scratch<T> forward_, plain_, partials_;
  bool wants_params_, has_ray_sums_;
  RayTerms<T> rays_;
  int64_t sum_width_;
  Scratch<T> sums_, heads_;
  RaySums<T> ray_sums_;
  Block<T> block_;
};

template <class T>
int check(const Input<T>& input, int64_t extra_width, const int64_t* dims, int64_t n_layers, int64_t n,
          int64_t n_extra, int64_t n_threads) {
  if (n_layers < 1 || n < 0 || n_threads < 1 || extra_width < 0) return PMF_BAD_ARGUMENT;
  if (!std::all_of(dims, dims + n_layers + 1, [](int64_t d) { return d >= 1; })) return PMF_BAD_ARGUMENT;
  if (extra_width > dims[0] || n_extra < 0) return PMF_BAD_ARGUMENT;
  if (input.has_rays() && !input.rays.valid(n)) return kBadIndex;
  return PMF_OK;
}

template <class Function>
int guarded(int status, Function run) {  // no exception crosses the C ABI
  if (status != PMF_OK) return status;
  try {
    return run();
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
}

}  // namespace pmf
