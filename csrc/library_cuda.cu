/* CUDA library: what the library as a whole answers for. */
#include "launch.h"

COSMOS_EXPORT int32_t cosmos_abi_version() { return COSMOS_ABI_VERSION; }

/* Compute capabilities, times 100, that this library holds machine code for, in ascending order: "800,900". */
COSMOS_EXPORT const char* cosmos_cuda_architectures() {
#define COSMOS_TEXT(...) #__VA_ARGS__
#define COSMOS_EXPANDED_TEXT(...) COSMOS_TEXT(__VA_ARGS__)
#ifdef __CUDA_ARCH_LIST__
  return COSMOS_EXPANDED_TEXT(__CUDA_ARCH_LIST__);
#else
  return "800,900"; /* the emulation */
#endif
}

/* A status of any function of this library in words. */
COSMOS_EXPORT const char* cosmos_cuda_error(int32_t status) {
  switch (status) {
    case COSMOS_BAD_ARGUMENT: return "an argument is out of range";
    case COSMOS_NO_MEMORY: return "out of memory";
    case COSMOS_NO_PATH: return "this device cannot run the path that was asked for";
    default: return cosmos::runtime_error(status);
  }
}
