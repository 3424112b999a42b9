/* What every source of the native libraries shares: export, inlining, status codes, the version of the interface. */
#ifndef COSMOS_H
#define COSMOS_H

#include <cstdint>

/* Raised with every change of an exported signature or struct, and with every new function; native.py holds its twin. */
#define COSMOS_ABI_VERSION 8

#define COSMOS_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef __CUDACC__
#define COSMOS_INLINE __host__ __device__ __forceinline__
#else
#define COSMOS_INLINE inline __attribute__((always_inline))
#endif

/* Positive statuses are those of the CUDA runtime. */
enum CosmosStatus : int32_t { COSMOS_OK = 0, COSMOS_BAD_ARGUMENT = -1, COSMOS_NO_MEMORY = -2, COSMOS_NO_PATH = -3 };

#endif /* COSMOS_H */
