// Fused MLP on the GPU: activations never leave shared memory, products run on tensor cores.
//
// Forward: a warp takes 16 or 32 rows through all layers on its own, so that a block waits only once, for its copy of
// the weights. Blocks stay and take tile after tile. Numbers are float at the border; rows, weights and hidden
// activations are rounded to half (beyond 65504: inf), sums are float. Weights are converted and padded once per call,
// into scratch memory of the caller, and staged in shared memory when they fit, else read through the cache.
// NaN and inf stay in their row of the output and of the gradient of x.
// Backward: fused_mlp_backward_cuda.h.
#include "fused_mlp_backward_cuda.h"

namespace pmf {
namespace {

constexpr int kForwardThreads = 128, kForwardWarps = kForwardThreads / kWarp;
constexpr int kColumns = 4;  // of the forward products at a time
constexpr int kRegisters = 64 << 10, kForwardRegisters = 168, kBackwardRegisters = 128;  // of a processor; of a thread

// Weights as half, padded with zeros, and behind them the same as bfloat16. blockIdx.y is the layer.
__global__ void __launch_bounds__(256)
    pack_weights_kernel(MlpPlan plan, const float* __restrict__ params, __half* __restrict__ packed) {
  const int l = static_cast<int>(blockIdx.y), i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int width = plan.dims[l], stride = plan.stride(l);
  if (i >= plan.weights_at[l + 1] - plan.weights_at[l]) return;
  const int row = i / stride, col = i % stride;
  const bool is_inside = row < plan.dims[l + 1] && col < width;
  const float value = is_inside ? params[plan.params_at[l] + row * width + col] : 0.0f;
  const int at = plan.weights_at[l] + i;
  put(packed + at, value);
  put(reinterpret_cast<__nv_bfloat16*>(packed + plan.weights_at[plan.n_layers]) + at, value);
}

int pack_weights(const MlpPlan& plan, const float* params, __half* packed, void* stream) {
  int largest = 0;
  for (int l = 0; l < plan.n_layers; ++l) {
    const int count = plan.weights_at[l + 1] - plan.weights_at[l];
    largest = largest > count ? largest : count;
  }
  const dim3 grid(blocks_for(largest, 256), static_cast<unsigned>(plan.n_layers));
  return PMF_LAUNCH((pack_weights_kernel), grid, 256, 0, stream, plan, params, packed);
}

// A warp has `n_tiles` tiles of activations: one when layers can overwrite their input, else two to change between.
template <int R, bool kStaged>
__global__ void __launch_bounds__(kForwardThreads)
    fused_mlp_kernel(MlpPlan plan, MlpInput in, int tile_stride, int n_tiles, const __half* __restrict__ packed,
                     float* __restrict__ out) {
  PMF_DYNAMIC_SHARED(unsigned char, shared);
  constexpr int kRows = R * kTile;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, n_packed = plan.weights_at[plan.n_layers];
  float* stage = reinterpret_cast<float*>(shared) + warp * kStageFloats;
  __half* tiles = reinterpret_cast<__half*>(reinterpret_cast<float*>(shared) + kForwardWarps * kStageFloats);
  __half* first_tile = tiles + warp * n_tiles * kRows * tile_stride;
  __half* staged = tiles + kForwardWarps * n_tiles * kRows * tile_stride;
  if (kStaged) {
    for (int i = static_cast<int>(threadIdx.x); i < n_packed / 8; i += kForwardThreads)
      reinterpret_cast<uint4*>(staged)[i] = reinterpret_cast<const uint4*>(packed)[i];
    __syncthreads();
  }
  const __half* weights = kStaged ? staged : packed;
  const int last = plan.n_layers - 1, width = plan.dims[plan.n_layers];
  const int64_t step = static_cast<int64_t>(gridDim.x) * kForwardWarps * kRows;
  int64_t row = (static_cast<int64_t>(blockIdx.x) * kForwardWarps + warp) * kRows;
  for (; row < in.n; row += step) {
    __half *h = first_tile, *next = h + (n_tiles - 1) * kRows * tile_stride;
    in.template load<kRows>(row, h, tile_stride);
    __syncwarp();
    for (int l = 0; l < last; ++l) {
      hidden_layer<R, kColumns>(h, tile_stride, weights + plan.weights_at[l], plan.stride(l), plan.tiles(l),
                                plan.dims[l + 1], next, tile_stride, stage);
      __half* swapped = h;
      h = next;
      next = swapped;
    }
    warp_product<__half, R, kColumns, true>(h, tile_stride, weights + plan.weights_at[last], plan.stride(last),
                                            plan.tiles(last), 0, plan.tiles(last + 1), stage,
                                            [&](const float* tile, int r0, int col) {
      for (int e = lane_of_warp(); e < kTile * kTile; e += kWarp) {
        const int r = e / kTile, c = e % kTile;
        if (row + r0 + r < in.n && col + c < width)
          out[(row + r0 + r) * width + col + c] = tile[r * kStageStride + c];
      }
    });
    __syncwarp();
  }
}

// Blocks that stay and share the work: as many as the processors hold.
unsigned staying_blocks(int64_t blocks, int processors, int shared_limit, int64_t bytes, int registers) {
  const int64_t by_shared = shared_limit / bytes, by_registers = kRegisters / registers;
  const int64_t each = by_shared < by_registers ? by_shared : by_registers;
  const int64_t most = processors * (each > 1 ? each : 1);
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

template <int R>
int forward(const MlpPlan& plan, const MlpInput& in, int n_tiles, const __half* packed, float* out, void* stream) {
  int shared_limit = 0, processors = 0;
  PMF_TRY(device_limits(&shared_limit, &processors));
  const int stride = widest_stride(plan, plan.n_layers);
  const int64_t stage_bytes = kForwardWarps * kStageFloats * static_cast<int64_t>(sizeof(float));
  const int64_t base = stage_bytes + int64_t{2} * kForwardWarps * n_tiles * R * kTile * stride;
  const int64_t with_weights = base + int64_t{2} * plan.weights_at[plan.n_layers];
  const int64_t blocks = blocks_for(in.n, kForwardWarps * R * kTile);
  const auto run = [&](auto kernel, int64_t bytes) {
    PMF_TRY(allow_shared(kernel, bytes));
    const int registers = kForwardRegisters * kForwardThreads;
    return PMF_LAUNCH((kernel), staying_blocks(blocks, processors, shared_limit, bytes, registers), kForwardThreads,
                      static_cast<size_t>(bytes), stream, plan, in, stride, n_tiles, packed, out);
  };
  if (with_weights <= shared_limit) return run(fused_mlp_kernel<R, true>, with_weights);
  return base <= shared_limit ? run(fused_mlp_kernel<R, false>, base) : static_cast<int>(PMF_BAD_ARGUMENT);
}

// 128 rows a block while their activations leave room for weights, else 64.
int forward(const MlpPlan& plan, const MlpInput& in, const __half* packed, float* out, void* stream) {
  int widest = 0;  // of the hidden layers
  for (int l = 1; l < plan.n_layers; ++l) widest = widest > plan.dims[l] ? widest : plan.dims[l];
  const int n_tiles = widest <= kColumns * kTile ? 1 : 2;
  return n_tiles * widest_stride(plan, plan.n_layers) <= 208 ? forward<2>(plan, in, n_tiles, packed, out, stream)
                                                             : forward<1>(plan, in, n_tiles, packed, out, stream);
}

// The largest block that fits; weights in shared memory before more rows, sums in shared memory before all.
bool choose_layout(const MlpPlan& plan, bool wants_params, int64_t limit, BackwardLayout* layout) {
  for (const bool sums_in_shared : {true, false}) {
    for (const int rows : {128, 96, 64, 32, 16}) {
      if (sums_in_shared && rows < 64) continue;
      for (const bool is_staged : {true, false}) {
        *layout = backward_layout(plan, rows, is_staged, sums_in_shared, wants_params);
        if (layout->bytes() <= limit) return true;
      }
    }
  }
  return false;
}

int backward(const MlpPlan& plan, const MlpInput& in, const MlpGradients& grad, const __half* packed, void* stream) {
  int shared_limit = 0, processors = 0;
  PMF_TRY(device_limits(&shared_limit, &processors));
  BackwardLayout layout;
  if (!choose_layout(plan, grad.params != nullptr, shared_limit, &layout)) return PMF_BAD_ARGUMENT;
  const int64_t blocks = blocks_for(in.n, layout.rows), bytes = layout.bytes();
  const int threads = layout.rows / kTile * kWarp;
  const auto run = [&](auto kernel) {
    PMF_TRY(allow_shared(kernel, bytes));
    return PMF_LAUNCH((kernel), staying_blocks(blocks, processors, shared_limit, bytes, kBackwardRegisters * threads),
                      static_cast<unsigned>(threads), static_cast<size_t>(bytes), stream, plan, in, grad, layout,
                      packed);
  };
  return layout.is_staged ? run(fused_mlp_backward_kernel<true>) : run(fused_mlp_backward_kernel<false>);
}

bool make_input(const MlpPlan& plan, const float* x, int64_t x_row, int64_t x_col, const float* extra,
                int64_t extra_width, const int64_t* index, int64_t n, MlpInput* input) {
  if (extra_width < 0 || extra_width > plan.dims[0] || n < 0) return false;
  const int width = static_cast<int>(extra_width);
  *input = {x, x_row, x_col, n, extra, index, plan.dims[0] - width, width};
  return true;
}

}  // namespace
}  // namespace pmf

// Bytes of `scratch` for both functions; 0 if these widths are not supported (at most 8 layers of at most 256).
PMF_EXPORT int64_t pmf_fused_mlp_cuda_scratch_bytes(const int64_t* dims, int64_t n_layers, int64_t /*n*/,
                                                    int64_t /*extra_width*/) {
  pmf::MlpPlan plan;
  return pmf::make_plan(dims, n_layers, &plan) ? int64_t{2} * 2 * plan.weights_at[plan.n_layers] : 0;
}

// As the CPU functions (fused_mlp_cpu.cpp), with device pointers (dims is a host array), scratch of the size above,
// aligned to 32 bytes, and a stream. PMF_BAD_ARGUMENT: widths that are not supported. `extra_index` is not checked.
PMF_EXPORT int pmf_fused_mlp_cuda_f32(const float* x, int64_t x_row, int64_t x_col, const float* extra,
                                      int64_t extra_width, const int64_t* extra_index, int64_t /*n_extra*/,
                                      const float* params, const int64_t* dims, int64_t n_layers, int64_t n,
                                      float* out, void* scratch, void* stream) {
  pmf::MlpPlan plan;
  pmf::MlpInput input;
  if (!pmf::make_plan(dims, n_layers, &plan)) return PMF_BAD_ARGUMENT;
  if (!pmf::make_input(plan, x, x_row, x_col, extra, extra_width, extra_index, n, &input)) return PMF_BAD_ARGUMENT;
  if (n == 0) return PMF_OK;
  auto* packed = static_cast<__half*>(scratch);
  PMF_TRY(pmf::pack_weights(plan, params, packed, stream));
  return pmf::forward(plan, input, packed, out, stream);
}

PMF_EXPORT int pmf_fused_mlp_backward_cuda_f32(
    const float* grad_out, int64_t grad_row, int64_t grad_col, const float* x, int64_t x_row, int64_t x_col,
    const float* extra, int64_t extra_width, const int64_t* extra_index, int64_t n_extra, const float* params,
    const int64_t* dims, int64_t n_layers, int64_t n, float* grad_x, int64_t grad_x_row, int64_t grad_x_col,
    float* grad_extra, float* grad_params, void* scratch, void* stream) {
  pmf::MlpPlan plan;
  pmf::MlpInput input;
  if (!pmf::make_plan(dims, n_layers, &plan)) return PMF_BAD_ARGUMENT;
  if (!pmf::make_input(plan, x, x_row, x_col, extra, extra_width, extra_index, n, &input)) return PMF_BAD_ARGUMENT;
  if (extra_width == 0) grad_extra = nullptr;
  const int64_t float_bytes = sizeof(float);
  if (grad_params != nullptr)
    PMF_TRY(pmf::zero_async(grad_params, plan.params_at[plan.n_layers] * float_bytes, stream));
  if (grad_extra != nullptr && (extra_index != nullptr || n == 0))  // an empty index may come as a null pointer
    PMF_TRY(pmf::zero_async(grad_extra, n_extra * extra_width * float_bytes, stream));
  if (n == 0) return PMF_OK;
  auto* packed = static_cast<__half*>(scratch);
  PMF_TRY(pmf::pack_weights(plan, params, packed, stream));
  const pmf::MlpGradients grad{grad_out,   grad_row,   grad_col,   grad_x,
                               grad_x_row, grad_x_col, grad_extra, grad_params};
  return pmf::backward(plan, input, grad, packed, stream);
}
