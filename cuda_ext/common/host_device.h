// PMF_HD marks functions compiled for host and device alike (the *_math.h files).
#pragma once
#if defined(__CUDACC__) || defined(PMF_EMULATE)
#define PMF_HD __host__ __device__ __forceinline__
#else
#define PMF_HD inline __attribute__((always_inline))
#endif
