// Counts to offsets on the device, on the stream, without a look from the host: what lies between count and fill.
#pragma once
#include <cstdint>

#include "abi.h"

namespace pmf {

// offsets (n + 1): on entry offsets[i + 1] holds the count of item i; on return offsets[i] is the sum of the counts
// before item i, so offsets[0] = 0 and offsets[n] is the total. `scratch` has pmf_scan_scratch_bytes(n) bytes.
int counts_to_offsets(int64_t* offsets, int64_t n, void* scratch, void* stream);

}  // namespace pmf

// 8 * ceil(n / 4096), and at least 8: one int64 for each block of the scan.
PMF_EXPORT int64_t pmf_scan_scratch_bytes(int64_t n);
