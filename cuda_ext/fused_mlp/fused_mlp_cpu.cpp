// Fused MLP on the CPU: forward and backward over blocks of points whose activations never leave L1/L2.
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
#include <omp.h>

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
namespace {

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

  // Rows [row, row + count) of the input into `local`.
  void load(int64_t row, int64_t count, T* local) const {
    const int64_t ld = layout.width(0), width = input.extra_width, x_width = layout.dims[0] - width;
    load_block(input.x, row, count, x_width, local, ld);  // may write padding, so the second part follows
    for (int64_t r = 0; r < count && width > 0; ++r)
      std::copy_n(input.extra + (row + r) * width, width, local + r * ld + x_width);
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
};

template <class T>
int forward(const Input<T>& input, const T* params, const int64_t* dims, int64_t n_layers, int64_t n, T* out,
            int64_t n_threads) {
  const Layout<T> layout(dims, n_layers, input.rays.width);
  const int64_t buffer = kBlock * layout.widest;
  Scratch<T> weights(layout.forward_at.back()), scratch(2 * buffer * n_threads);
  pack_weights<T>(layout, params, weights.get(), nullptr);
  const RayTerms<T> rays(layout, input, params, n, n_threads);
  const Block<T> work{layout, input, rays, weights.get()};
  const Matrix<T> target{out, dims[n_layers], 1};
  const int64_t n_blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(dynamic, 8) num_threads(n_threads) if (n > PMF_MIN_PARALLEL)
  for (int64_t block = 0; block < n_blocks; ++block) {
    T* in = scratch.get() + 2 * buffer * omp_get_thread_num();
    T* result = in + buffer;
    const int64_t row = block * kBlock, count = std::min(kBlock, n - row);
    work.load(row, count, in);
    for (int64_t l = 0; l < n_layers; ++l, std::swap(in, result)) work.forward_layer(l, row, count, in, result);
    store_block(in, layout.width(n_layers), row, count, dims[n_layers], target);
  }
  return PMF_OK;
}

// Which gradients are wanted, and where they go; null: not wanted.
template <class T>
struct Gradients {
  Matrix<T> x;
  T *extra, *params;
};

template <class T>
struct Backward {
  const Block<T>& work;
  const T* plain;  // weights packed for the input gradient
  Matrix<const T> grad;
  Gradients<T> to;
  const RaySums<T>* ray_sums;  // null: no per-ray part, or its gradients are not wanted

  // One block: recompute, then per layer the weight gradient (into `partial`) and the input gradient.
  void run(int64_t chunk_begin, int64_t row, int64_t count, T* scratch, T* partial) const {
    const Layout<T>& layout = work.layout;
    const int64_t n_layers = layout.n_layers, buffer = kBlock * layout.widest;
    T* z = scratch + n_layers * buffer;  // gradient of the layer's output; activation l is at scratch + l * buffer
    T* next = z + buffer;
    work.load(row, count, scratch);
    for (int64_t l = 0; l + 1 < n_layers; ++l)
      work.forward_layer(l, row, count, scratch + l * buffer, scratch + (l + 1) * buffer);
    load_block(grad, row, count, layout.dims[n_layers], z, layout.width(n_layers));
    for (int64_t l = n_layers - 1; l >= 0; --l) {
      const T* h = scratch + l * buffer;
      const int64_t n_out = layout.dims[l + 1], in_width = layout.width(l), out_width = layout.width(l + 1);
      if (partial != nullptr)
        multiply<false, Store::kAdd>(Product<T>{z, 1, out_width, h, in_width, partial + layout.plain_at[l],
                                                in_width, nullptr, n_out, in_width, count});
      if (l == 0) break;
      multiply<true, Store::kGate>(Product<T>{z, out_width, 1, plain + layout.plain_at[l], in_width, next, in_width,
                                              h, count, in_width, n_out});
      std::swap(z, next);
    }
    if (ray_sums != nullptr) ray_sums->add(chunk_begin, row, count, z);
    input_gradient(row, count, z, next);
  }

  // From the gradient z of the first layer's output to those of x and of a second part that rows have of their own.
  void input_gradient(int64_t row, int64_t count, const T* z, T* local) const {
    const Layout<T>& layout = work.layout;
    const bool wants_extra = to.extra != nullptr && work.input.extra != nullptr;
    const int64_t ld = layout.width(0), out_width = layout.width(1);
    const int64_t width = work.input.extra_width, x_width = layout.dims[0] - width;
    if (to.x.data == nullptr && !wants_extra) return;
    multiply<true, Store::kPlain>(Product<T>{z, out_width, 1, plain, ld, local, ld, nullptr, count,
                                             wants_extra ? ld : padded<T>(x_width), layout.dims[1]});
    if (to.x.data != nullptr) store_block(local, ld, row, count, x_width, to.x);
    for (int64_t r = 0; r < count && wants_extra; ++r)
      std::copy_n(local + r * ld + x_width, width, to.extra + (row + r) * width);
  }
};

// Adds the partial gradients in chunk order and drops the padding.
template <class T>
void reduce_partials(const Layout<T>& layout, const T* partials, int64_t n_chunks, T* grad_params) {
  for (int64_t l = 0; l < layout.n_layers; ++l) {
    const int64_t n_in = layout.dims[l], n_out = layout.dims[l + 1];
    for (int64_t o = 0; o < n_out; ++o) {
      T* row = grad_params + layout.params_at[l] + o * layout.params_row(l);
      std::fill(row, row + n_in, T(0));
      for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
        const T* part = partials + chunk * layout.plain_at.back() + layout.plain_at[l] + o * layout.width(l);
        for (int64_t i = 0; i < n_in; ++i) row[i] += part[i];
      }
    }
  }
}

template <class T>
int backward(Matrix<const T> grad, const Input<T>& input, const T* params, const int64_t* dims, int64_t n_layers,
             int64_t n, const Gradients<T>& to, int64_t n_threads) {
  const Layout<T> layout(dims, n_layers, input.rays.width);
  const int64_t per_thread = (n_layers + 2) * kBlock * layout.widest;
  const int64_t wanted = std::max(kMinChunk, (n + kMaxChunks - 1) / kMaxChunks);
  const int64_t chunk_size = (wanted + kBlock - 1) / kBlock * kBlock;
  const int64_t n_chunks = (n + chunk_size - 1) / chunk_size;
  const int64_t partial_size = to.params == nullptr ? 0 : layout.plain_at.back();
  Scratch<T> forward(layout.forward_at.back()), plain(layout.plain_at.back());
  Scratch<T> scratch(per_thread * n_threads), partials(partial_size * n_chunks);
  pack_weights(layout, params, forward.get(), plain.get());
  const RayTerms<T> rays(layout, input, params, n, n_threads);
  const bool wants_rays = input.has_rays() && (to.extra != nullptr || to.params != nullptr);
  const int64_t sum_width = wants_rays ? layout.width(1) : 0;
  Scratch<T> sums(wants_rays ? rays.layer->count() * sum_width : 0), heads(n_chunks * sum_width);
  const RaySums<T> ray_sums{input.rays.index, wants_rays ? rays.layer->first() : 0, sum_width, chunk_size, sums.get(),
                            heads.get()};
  const Block<T> block{layout, input, rays, forward.get()};
  const Backward<T> work{block, plain.get(), grad, to, wants_rays ? &ray_sums : nullptr};
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads) if (n > PMF_MIN_PARALLEL)
  for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
    T* mine = scratch.get() + per_thread * omp_get_thread_num();
    T* partial = to.params == nullptr ? nullptr : partials.get() + chunk * partial_size;
    const int64_t begin = chunk * chunk_size, end = std::min(n, begin + chunk_size);
    for (int64_t row = begin; row < end; row += kBlock)
      work.run(begin, row, std::min(kBlock, end - row), mine, partial);
  }
  if (to.params != nullptr) reduce_partials(layout, partials.get(), n_chunks, to.params);
  if (wants_rays) {
    ray_sums.finish(n);
    if (to.extra != nullptr) rays.layer->input_gradient(sums.get(), to.extra, n_threads);
    if (to.params != nullptr) rays.layer->weight_gradient(sums.get(), layout.dims[0], to.params, n_threads);
  }
  return PMF_OK;
}

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

}  // namespace
}  // namespace pmf

// x (n, dims[0] - extra_width) and grad_out (n, dims[n_layers]) with any strides (in elements); extra
// (n_extra, extra_width) row-major, extra_index (n) sorted, or null for n_extra == n; params packed as in
// fused_mlp_math.h, dims (n_layers + 1), out (n, dims[n_layers]) row-major.
// Backward: grad_x (strides given), grad_extra and grad_params may each be null: that gradient is then not computed.
#define PMF_DEFINE_FUSED_MLP(T, SUFFIX)                                                                              \
  PMF_EXPORT int pmf_fused_mlp_cpu_##SUFFIX(                                                                         \
      const T* x, int64_t x_row, int64_t x_col, const T* extra, int64_t extra_width, const int64_t* extra_index,     \
      int64_t n_extra, const T* params, const int64_t* dims, int64_t n_layers, int64_t n, T* out,                    \
      int64_t n_threads) {                                                                                           \
    const pmf::Input<T> input({x, x_row, x_col}, extra, extra_width, extra_index, n_extra);                          \
    return pmf::guarded(pmf::check(input, extra_width, dims, n_layers, n, n_extra, n_threads), [&] {                 \
      return pmf::forward<T>(input, params, dims, n_layers, n, out, n_threads);                                      \
    });                                                                                                              \
  }                                                                                                                  \
  PMF_EXPORT int pmf_fused_mlp_backward_cpu_##SUFFIX(                                                                \
      const T* grad_out, int64_t grad_row, int64_t grad_col, const T* x, int64_t x_row, int64_t x_col,               \
      const T* extra, int64_t extra_width, const int64_t* extra_index, int64_t n_extra, const T* params,             \
      const int64_t* dims, int64_t n_layers, int64_t n, T* grad_x, int64_t grad_x_row, int64_t grad_x_col,           \
      T* grad_extra, T* grad_params, int64_t n_threads) {                                                            \
    const pmf::Input<T> input({x, x_row, x_col}, extra, extra_width, extra_index, n_extra);                          \
    return pmf::guarded(pmf::check(input, extra_width, dims, n_layers, n, n_extra, n_threads), [&] {                 \
      return pmf::backward<T>({grad_out, grad_row, grad_col}, input, params, dims, n_layers, n,                      \
                              {{grad_x, grad_x_row, grad_x_col}, grad_extra, grad_params}, n_threads);               \
    });                                                                                                              \
  }

PMF_DEFINE_FUSED_MLP(float, f32)
PMF_DEFINE_FUSED_MLP(double, f64)
