// Inclusive scan of int64 counts in three launches: sums of tiles, scan of the sums, scan of the tiles.
//
// A block of 256 threads takes a tile of 4096 counts as 16 rows of 256: reads and writes are coalesced and a row is
// scanned with warp shuffles. Batches of up to 4096 rays are one tile and one launch. A single pass that chains the
// blocks would read the counts once instead of twice, but it needs blocks that wait for each other; the counts of a
// million rays are 8 MB, next to nothing beside the samples they count. Integers: the result does not depend on order.
#include "scan_cuda.h"

#include "launch.h"

namespace pmf {
namespace {

constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / kWarp;
constexpr int64_t kScanTile = 4096;

// Sum of the values of this thread and those before it; `total` becomes that of the block. Every thread calls it.
__device__ int64_t block_scan(int64_t value, int64_t* total) {
  __shared__ int64_t warp_sums[kScanWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t before = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value += before;
  }
  if (lane == kWarp - 1) warp_sums[warp] = value;
  __syncthreads();
  int64_t sum = 0;
#pragma unroll
  for (int w = 0; w < kScanWarps; ++w) {
    if (w == warp) value += sum;
    sum += warp_sums[w];
  }
  *total = sum;
  __syncthreads();  // the next call overwrites warp_sums
  return value;
}

__global__ void __launch_bounds__(kScanThreads)
    sum_tiles(const int64_t* __restrict__ counts, int64_t n, int64_t* __restrict__ sums) {
  const int64_t first = blockIdx.x * kScanTile;
  int64_t own = 0, total;
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < kScanTile; k += kScanThreads) own += first + k < n ? counts[first + k] : 0;
  block_scan(own, &total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// Scans the range of its block in place, row after row; `before` is the sum of everything in front of the range.
__device__ void scan_range(int64_t* values, int64_t first, int64_t end, int64_t before) {
  for (int64_t row = first; row < end; row += kScanThreads) {
    const int64_t i = row + threadIdx.x;
    int64_t total;
    const int64_t sum = block_scan(i < end ? values[i] : 0, &total);
    if (i < end) values[i] = before + sum;
    before += total;
  }
}

__global__ void __launch_bounds__(kScanThreads) scan_sums(int64_t* sums, int64_t n) { scan_range(sums, 0, n, 0); }

// `sums` is not read by the first tile and may be null when there is only one.
__global__ void __launch_bounds__(kScanThreads)
    scan_tiles(int64_t* offsets, int64_t n, const int64_t* __restrict__ sums) {
  const int64_t first = blockIdx.x * kScanTile;
  const int64_t end = first + kScanTile < n ? first + kScanTile : n;
  scan_range(offsets + 1, first, end, blockIdx.x == 0 ? 0 : sums[blockIdx.x - 1]);
  if (blockIdx.x == 0 && threadIdx.x == 0) offsets[0] = 0;
}

}  // namespace

int counts_to_offsets(int64_t* offsets, int64_t n, void* scratch, void* stream) {
  if (n <= 0) return zero_async(offsets, sizeof(int64_t), stream);
  const unsigned n_tiles = blocks_for(n, kScanTile);
  auto* sums = static_cast<int64_t*>(scratch);
  if (n_tiles > 1) {
    PMF_TRY(PMF_LAUNCH((sum_tiles), dim3(n_tiles), dim3(kScanThreads), 0, stream, offsets + 1, n, sums));
    PMF_TRY(PMF_LAUNCH((scan_sums), dim3(1), dim3(kScanThreads), 0, stream, sums, static_cast<int64_t>(n_tiles)));
  }
  return PMF_LAUNCH((scan_tiles), dim3(n_tiles), dim3(kScanThreads), 0, stream, offsets, n, sums);
}

}  // namespace pmf

PMF_EXPORT int64_t pmf_scan_scratch_bytes(int64_t n) {
  const int64_t n_tiles = n > 0 ? (n + pmf::kScanTile - 1) / pmf::kScanTile : 1;
  return n_tiles * static_cast<int64_t>(sizeof(int64_t));
}
