// Spherical harmonics on the CPU: one short polynomial per direction, rows in and rows out; memory bound.
#include <type_traits>

#include "abi.h"
#include "../common/host_device.h"
#include "sh_encode_math.h"

namespace {

template <class Real, int DEGREE>
void forward(const Real* dirs, int64_t n, Real* out, int64_t n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n > PMF_MIN_PARALLEL)
    for (int64_t i = 0; i < n; ++i)
        pmf::sh_values<DEGREE>(dirs[3 * i], dirs[3 * i + 1], dirs[3 * i + 2], out + i * DEGREE * DEGREE);
}

template <class Real, int DEGREE>
void backward(const Real* dirs, int64_t n, const Real* grad, Real* grad_dirs, int64_t n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n > PMF_MIN_PARALLEL)
    for (int64_t i = 0; i < n; ++i)
        pmf::sh_gradient<DEGREE>(dirs[3 * i], dirs[3 * i + 1], dirs[3 * i + 2], grad + i * DEGREE * DEGREE,
                                 grad_dirs + 3 * i);
}

// Calls body(std::integral_constant<int, DEGREE>) for a supported degree.
template <class Body>
int with_degree(int64_t degree, Body body) {
    switch (degree) {
        case 1: body(std::integral_constant<int, 1>{}); return PMF_OK;
        case 2: body(std::integral_constant<int, 2>{}); return PMF_OK;
        case 3: body(std::integral_constant<int, 3>{}); return PMF_OK;
        case 4: body(std::integral_constant<int, 4>{}); return PMF_OK;
        default: return PMF_BAD_ARGUMENT;
    }
}

}  // namespace

// dirs, grad_dirs (n, 3); out, grad (n, degree^2).
#define PMF_SH_ENCODE(REAL, SUFFIX)                                                                                    \
    PMF_EXPORT int pmf_sh_encode_cpu_##SUFFIX(const REAL* dirs, int64_t n, int64_t degree, REAL* out,                  \
                                              int64_t n_threads) {                                                     \
        return with_degree(degree, [&](auto d) { forward<REAL, d()>(dirs, n, out, n_threads); });                      \
    }                                                                                                                  \
    PMF_EXPORT int pmf_sh_encode_backward_cpu_##SUFFIX(const REAL* dirs, int64_t n, int64_t degree, const REAL* grad,  \
                                                       REAL* grad_dirs, int64_t n_threads) {                           \
        return with_degree(degree, [&](auto d) { backward<REAL, d()>(dirs, n, grad, grad_dirs, n_threads); });         \
    }

PMF_SH_ENCODE(float, f32)
PMF_SH_ENCODE(double, f64)
