/* CUDA library: what the library as a whole answers for. */
#include "launch.h"

COSMOS_EXPORT int32_t cosmos_abi_version() { return COSMOS_ABI_VERSION; }

/* A status of any function of this library in words. */
COSMOS_EXPORT const char* cosmos_cuda_error(int32_t status) {
  switch (status) {
    case COSMOS_BAD_ARGUMENT: return "an argument is out of range";
    case COSMOS_NO_MEMORY: return "out of memory";
    case COSMOS_NO_PATH: return "this device cannot run the path that was asked for";
    default: return cosmos::runtime_error(status);
  }
}
