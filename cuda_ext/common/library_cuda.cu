// Identification of the CUDA library; the Python side refuses a library of another ABI version.
#include "abi.h"

PMF_EXPORT int pmf_abi_version() { return PMF_ABI_VERSION; }
