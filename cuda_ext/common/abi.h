// The C ABI between Python (ctypes) and the native kernels: raw pointers, sizes, a thread count or a stream.
// No torch header is ever included here, so one library serves every torch version and a file compiles in seconds.
//
// Rules for every exported function
//   - name: pmf_<op>[_backward]_<cpu|cuda>_<f32|f64>; the last argument is int64_t n_threads (cpu) or void* stream (cuda)
//   - cuda: pointers are to device memory but for what the comment calls host; work goes on the stream, nothing waits for
//     it; scratch memory comes before the stream, as large as the kernel's pmf_..._bytes says
//   - returns 0, or a non-zero error code; never throws, never prints, never allocates memory that it returns
//   - counts are int64_t; pointers may be null only where the comment at the function says so
//   - the caller owns and has validated all buffers (posemap_fast/ops/<op>.py does it)
#pragma once
#include <cstdint>

#define PMF_ABI_VERSION 3
#define PMF_EXPORT extern "C" __attribute__((visibility("default")))

enum PmfStatus : int { PMF_OK = 0, PMF_BAD_ARGUMENT = 1, PMF_CUDA_ERROR_BASE = 1000 };

// Work below this many elements stays on the calling thread: waking a pool costs more than it saves,
// and on a busy machine a descheduled partner thread turns 17 us into milliseconds.
#define PMF_MIN_PARALLEL 4096
