/* Host side of a launch: the device's figures, and a kernel with dynamic shared memory on a stream. */
#ifndef COSMOS_LAUNCH_H
#define COSMOS_LAUNCH_H

#include "device.h"

#ifdef COSMOS_EMULATE
#include "emulation/launch.h"
#else

namespace cosmos {

struct DeviceFigures {
  int multiprocessors = 0, major = 0;
};

inline const char* runtime_error(int32_t status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

/* Of the current device; returns a cudaError_t. */
inline int32_t device_figures(DeviceFigures* figures) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&figures->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&figures->major, cudaDevAttrComputeCapabilityMajor, device);
  return error;
}

/* One struct of parameters a kernel, passed by value; returns a cudaError_t. */
template <typename Parameters>
int32_t launch(void (*kernel)(Parameters), int64_t blocks, int threads, int shared_bytes, void* stream,
               const Parameters& parameters) {
  cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(parameters);
  return cudaGetLastError();
}

}  // namespace cosmos

#endif /* COSMOS_EMULATE */

#endif /* COSMOS_LAUNCH_H */
