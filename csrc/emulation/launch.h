/* launch.h for the host: blocks one after the other; a device of two multiprocessors. */
#ifndef COSMOS_EMULATION_LAUNCH_H
#define COSMOS_EMULATION_LAUNCH_H

#include "fibers.h"

namespace cosmos {

struct DeviceFigures {
  int multiprocessors = 0, major = 0;
};

inline const char* runtime_error(int32_t) { return "an error of the emulated runtime"; }

inline int32_t device_figures(DeviceFigures* figures) {
  figures->multiprocessors = 2;
  figures->major = emulation::mode("sm_90") ? 9 : 8;
  return COSMOS_OK;
}

template <typename Parameters>
int32_t launch(void (*kernel)(Parameters), int64_t blocks, int threads, int shared_bytes, void*,
               const Parameters& parameters) {
  if (shared_bytes > emulation::kSharedBytes) return COSMOS_BAD_ARGUMENT;
  for (int64_t index = 0; index < blocks; ++index)
    emulation::run_block(static_cast<unsigned>(index), static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                         [kernel, &parameters] { kernel(parameters); });
  return COSMOS_OK;
}

}  // namespace cosmos

#endif /* COSMOS_EMULATION_LAUNCH_H */
