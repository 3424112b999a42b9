/* The primitives of device_sm90.h for the host: see fibers.h. */
#ifndef COSMOS_EMULATION_PRIMITIVES_SM90_H
#define COSMOS_EMULATION_PRIMITIVES_SM90_H

#include <type_traits>

#include "primitives.h"

namespace cosmos {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - emulation::shared);
}

/* A barrier's 64 bits: arrivals missing in this phase, arrivals a phase, parity of the phase. */
inline void barrier_start(uint64_t* barrier, int count) {
  *barrier = static_cast<uint64_t>(count) | static_cast<uint64_t>(count) << 20;
}
inline void barriers_started() {}
inline void barrier_arrive(uint64_t* barrier) {
  const uint64_t count = *barrier >> 20 & 0xfffff, missing = *barrier & 0xfffff, phase = *barrier >> 63;
  if (missing == 0) emulation::fail("a barrier was never started");
  const bool last = missing == 1;
  *barrier = (last ? count : missing - 1) | count << 20 | (last ? phase ^ 1 : phase) << 63;
  ++emulation::block->progress;
}
inline void barrier_wait(uint64_t* barrier, int parity) {
  while (static_cast<int>(*barrier >> 63) == parity) emulation::yield();
}

template <int kNumber, int kThreads>
void sync_threads() {
  emulation::Rendezvous& group = emulation::block->named[kNumber];
  group.expected = kThreads;
  emulation::meet(group, 0, nullptr, [](void**) {});
}

inline void publish_to_products() {}
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

namespace emulation {

inline Warpgroup& warpgroup() { return block->warpgroups[block->running->index / 128]; }
inline int place() { return static_cast<int>(block->running->index % 128); }

/* Element (row, k) of an operand, read where its descriptor says. */
template <Dtype kType>
float operand(uint64_t descriptor, bool across, int row, int k) {
  if (descriptor >> 62 != 1) fail("wgmma: only the 128-byte swizzle is emulated");
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t block_bytes = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t group_bytes = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const int line = across ? k : row, at = across ? row : k;
  uint32_t address = start + static_cast<uint32_t>(line / 8) * group_bytes + static_cast<uint32_t>(line % 8) * 128 +
                     static_cast<uint32_t>(at % 64) * 2;
  if (across) address += static_cast<uint32_t>(at / 64) * block_bytes;
  address ^= (address >> 7 & 7) << 4;
  if (address + 2 > sizeof(shared)) fail("wgmma: an operand ends outside shared memory");
  uint16_t bits;
  std::memcpy(&bits, shared + address, 2);
  return value_of<kType>(bits);
}

struct WarpgroupMultiply {
  float* sums;
  uint64_t left, right;
};

template <Dtype kType>
void multiply(float* const* sums, uint64_t left, uint64_t right, bool left_across, bool right_across) {
  static float a[64][16], b[256][16];
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 64; ++row) a[row][k] = operand<kType>(left, left_across, row, k);
    for (int row = 0; row < 256; ++row) b[row][k] = operand<kType>(right, right_across, row, k);
  }
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < 128; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      float sum = sums[t][i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      sums[t][i] = sum;
    }
  }
}

}  // namespace emulation

inline void products_begin() {}

template <Dtype kType, bool kLeftAcross, bool kRightAcross>
void warpgroup_product(float (&sums)[128], uint64_t left, uint64_t right) {
  emulation::WarpgroupMultiply own{sums, left, right};
  emulation::Warpgroup& group = emulation::warpgroup();
  emulation::meet(group.all, emulation::place(), &own, [&group](void** all) {
    std::vector<float*> sums_of;
    const auto& first = *static_cast<emulation::WarpgroupMultiply*>(all[0]);
    for (int t = 0; t < 128; ++t) {
      const auto& other = *static_cast<emulation::WarpgroupMultiply*>(all[t]);
      if (other.left != first.left || other.right != first.right) emulation::fail("wgmma: descriptors differ");
      sums_of.push_back(other.sums);
    }
    const auto work = [sums_of, left = first.left, right = first.right] {
      emulation::multiply<kType>(sums_of.data(), left, right, kLeftAcross, kRightAcross);
    };
    if (emulation::block->late) {
      group.open.push_back(work);
    } else {
      work();
    }
  });
}

inline void products_commit() {
  emulation::Warpgroup& group = emulation::warpgroup();
  emulation::meet(group.all, emulation::place(), nullptr, [&group](void**) {
    group.groups.push_back(std::move(group.open));
    group.open.clear();
  });
}

template <int kPending>
void products_wait() {
  emulation::Warpgroup& group = emulation::warpgroup();
  emulation::meet(group.all, emulation::place(), nullptr, [&group](void**) {
    while (group.groups.size() > static_cast<size_t>(kPending)) {
      for (const auto& work : group.groups.front()) work();
      group.groups.erase(group.groups.begin());
    }
  });
}

}  // namespace cosmos

#endif /* COSMOS_EMULATION_PRIMITIVES_SM90_H */
