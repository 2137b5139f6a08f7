// Spherical harmonics on the GPU: a thread per direction; memory bound.
//
// The values of a direction are neighbours in memory (up to 64 bytes), so a thread that wrote its own row would touch
// one line per value and lane. A block keeps its rows in shared memory and moves them in one coalesced sweep; their
// stride is odd, so that the threads of a warp meet in no bank. Nothing is summed over directions: no atomics.
#include <type_traits>

#include "abi.h"
#include "launch.h"
#include "sh_encode_math.h"

namespace {

using namespace pmf;

constexpr int THREADS = 128;  // directions per block

template <int DEGREE>
struct Row {
    static constexpr int SIZE = DEGREE * DEGREE;
    static constexpr int STRIDE = SIZE | 1;
    // Where value k of the block's rows, counted through, lies in shared memory.
    static PMF_HD int place(int k) { return k / SIZE * STRIDE + k % SIZE; }
};

// Directions of this block: THREADS, or fewer in the last one.
__device__ int block_count(int64_t first, int64_t n) {
    return static_cast<int>(n - first < THREADS ? n - first : THREADS);
}

template <class Real, int DEGREE>
__global__ void __launch_bounds__(THREADS)
    forward_kernel(const Real* __restrict__ dirs, int64_t n, Real* __restrict__ out) {
    using R = Row<DEGREE>;
    __shared__ Real rows[THREADS * R::STRIDE];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS;
    const int t = threadIdx.x, count = block_count(first, n);
    if (t < count) {
        const Real* d = dirs + 3 * (first + t);
        sh_values<DEGREE>(d[0], d[1], d[2], rows + t * R::STRIDE);
    }
    __syncthreads();
    for (int k = t; k < count * R::SIZE; k += THREADS) out[first * R::SIZE + k] = rows[R::place(k)];
}

template <class Real, int DEGREE>
__global__ void __launch_bounds__(THREADS)
    backward_kernel(const Real* __restrict__ dirs, int64_t n, const Real* __restrict__ grad,
                    Real* __restrict__ grad_dirs) {
    using R = Row<DEGREE>;
    __shared__ Real rows[THREADS * R::STRIDE];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS;
    const int t = threadIdx.x, count = block_count(first, n);
    for (int k = t; k < count * R::SIZE; k += THREADS) rows[R::place(k)] = grad[first * R::SIZE + k];
    __syncthreads();
    if (t >= count) return;
    const Real* d = dirs + 3 * (first + t);
    Real gradient[3];
    sh_gradient<DEGREE>(d[0], d[1], d[2], rows + t * R::STRIDE, gradient);
    for (int a = 0; a < 3; ++a) grad_dirs[3 * (first + t) + a] = gradient[a];
}

template <class Real, int DEGREE>
int forward(const Real* dirs, int64_t n, Real* out, void* stream) {
    return PMF_LAUNCH((forward_kernel<Real, DEGREE>), dim3(blocks_for(n, THREADS)), dim3(THREADS), 0, stream, dirs, n,
                      out);
}

template <class Real, int DEGREE>
int backward(const Real* dirs, int64_t n, const Real* grad, Real* grad_dirs, void* stream) {
    return PMF_LAUNCH((backward_kernel<Real, DEGREE>), dim3(blocks_for(n, THREADS)), dim3(THREADS), 0, stream, dirs, n,
                      grad, grad_dirs);
}

// Returns body(std::integral_constant<int, DEGREE>) for a supported degree.
template <class Body>
int with_degree(int64_t degree, Body body) {
    switch (degree) {
        case 1: return body(std::integral_constant<int, 1>{});
        case 2: return body(std::integral_constant<int, 2>{});
        case 3: return body(std::integral_constant<int, 3>{});
        case 4: return body(std::integral_constant<int, 4>{});
        default: return PMF_BAD_ARGUMENT;
    }
}

}  // namespace

// dirs, grad_dirs (n, 3); out, grad (n, degree^2).
#define PMF_SH_ENCODE(REAL, SUFFIX)                                                                                    \
    PMF_EXPORT int pmf_sh_encode_cuda_##SUFFIX(const REAL* dirs, int64_t n, int64_t degree, REAL* out, void* stream) { \
        return with_degree(degree, [&](auto d) { return forward<REAL, d()>(dirs, n, out, stream); });                  \
    }                                                                                                                  \
    PMF_EXPORT int pmf_sh_encode_backward_cuda_##SUFFIX(const REAL* dirs, int64_t n, int64_t degree, const REAL* grad, \
                                                        REAL* grad_dirs, void* stream) {                               \
        return with_degree(degree, [&](auto d) { return backward<REAL, d()>(dirs, n, grad, grad_dirs, stream); });     \
    }

PMF_SH_ENCODE(float, f32)
PMF_SH_ENCODE(double, f64)
