/* The primitives of device.h and the few CUDA names that kernels use, for the host: see fibers.h. */
#ifndef COSMOS_EMULATION_PRIMITIVES_H
#define COSMOS_EMULATION_PRIMITIVES_H

#include <cmath>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace cosmos {
namespace emulation {

struct ThreadIndex {
  struct Coordinate {
    operator unsigned() const { return block->running->index; }
  } x;
};
struct BlockIndex {
  struct Coordinate {
    operator unsigned() const { return block->index; }
  } x;
};
struct GridSize {
  struct Coordinate {
    operator unsigned() const { return block->grid; }
  } x;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

/* To the nearest, ties to even. */
inline uint16_t to_bfloat16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = to_bits(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float from_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_half(float value) {
  const uint16_t sign = static_cast<uint16_t>((to_bits(value) >> 16) & 0x8000);
  const double size = std::fabs(static_cast<double>(value));
  if (value != value) return 0x7fff;
  if (size >= 65520.0) return static_cast<uint16_t>(sign | 0x7c00);
  if (size == 0.0) return sign;
  int exponent = std::ilogb(size);
  if (exponent < -14) exponent = -14; /* subnormal: one fixed spacing */
  const long units = std::lrint(std::ldexp(size, 10 - exponent)); /* of the spacing, ties to even */
  return static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units)); /* a carry runs into the exponent rightly */
}
inline float from_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double size;
  if (exponent == 31) {
    size = fraction != 0 ? NAN : INFINITY;
  } else {
    size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  }
  return static_cast<float>((bits & 0x8000) != 0 ? -size : size);
}

inline unsigned lane() { return block->running->index % 32; }
inline Rendezvous& warp() { return block->warps[block->running->index / 32]; }

inline void perform(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

struct MatrixLoad {
  uint32_t* out;
  const unsigned char* row;
};

inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed) {
  MatrixLoad own{out, static_cast<const unsigned char*>(row)};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: misaligned row");
  meet(warp(), static_cast<int>(lane()), &own, [transposed](void** all) {
    for (int l = 0; l < 32; ++l) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int side = 0; side < 2; ++side) {
          const int row_of = transposed ? 2 * (l % 4) + side : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + side;
          const auto* from = static_cast<MatrixLoad*>(all[matrix * 8 + row_of])->row;
          std::memcpy(&pair[side], from + column * 2, 2);
        }
        static_cast<MatrixLoad*>(all[l])->out[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  });
}

struct Multiply {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

}  // namespace emulation

static constexpr emulation::ThreadIndex threadIdx{};
static constexpr emulation::BlockIndex blockIdx{};
static constexpr emulation::GridSize gridDim{};

inline void __syncthreads() {
  emulation::meet(emulation::block->all, static_cast<int>(threadIdx.x % 128), nullptr, [](void**) {});
}
inline void __syncwarp() {
  emulation::meet(emulation::warp(), static_cast<int>(emulation::lane()), nullptr, [](void**) {});
}

[[noreturn]] inline void refuse() { emulation::fail("a kernel refused to run"); }

inline unsigned char* shared_memory() { return emulation::shared; }

template <Dtype kType>
uint16_t element(float value) {
  return kType == Dtype::kHalf ? emulation::to_half(value) : emulation::to_bfloat16(value);
}
template <Dtype kType>
float value_of(uint16_t bits) {
  return kType == Dtype::kHalf ? emulation::from_half(bits) : emulation::from_bfloat16(bits);
}
template <Dtype kType>
uint32_t pack(float low, float high) {
  return element<kType>(low) | static_cast<uint32_t>(element<kType>(high)) << 16;
}
template <Dtype kType>
float2 unpack(uint32_t bits) {
  return {value_of<kType>(static_cast<uint16_t>(bits)), value_of<kType>(static_cast<uint16_t>(bits >> 16))};
}

inline float exp2_fast(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline void copy_async(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0)
    emulation::fail("cp.async: misaligned");
  const emulation::Copy copy{to, from, valid};
  if (emulation::block->late) {
    emulation::block->running->open.push_back(copy);
  } else {
    emulation::perform(copy);
  }
}
inline void commit_copies() {
  emulation::Fiber& self = *emulation::block->running;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}
template <int kPending>
void wait_copies() {
  emulation::Fiber& self = *emulation::block->running;
  while (self.groups.size() > static_cast<size_t>(kPending)) {
    for (const emulation::Copy& copy : self.groups.front()) emulation::perform(copy);
    self.groups.erase(self.groups.begin());
  }
}

inline void load_matrices(uint32_t (&out)[4], const void* row) { emulation::load_matrices(out, row, false); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) { emulation::load_matrices(out, row, true); }

template <Dtype kType>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Multiply own{c, a, {b0, b1}};
  emulation::meet(emulation::warp(), static_cast<int>(emulation::lane()), &own, [](void** all) {
    float left[16][16], right[16][8];
    for (int l = 0; l < 32; ++l) {
      const auto& of = *static_cast<emulation::Multiply*>(all[l]);
      const int g = l / 4, t = l % 4;
      for (int part = 0; part < 4; ++part) {
        const float2 pair = unpack<kType>(of.a[part]);
        const int row = g + part % 2 * 8, k = 2 * t + part / 2 * 8;
        left[row][k] = pair.x;
        left[row][k + 1] = pair.y;
      }
      for (int part = 0; part < 2; ++part) {
        const float2 pair = unpack<kType>(of.b[part]);
        right[2 * t + part * 8][g] = pair.x;
        right[2 * t + part * 8 + 1][g] = pair.y;
      }
    }
    for (int l = 0; l < 32; ++l) {
      float* sums = static_cast<emulation::Multiply*>(all[l])->c;
      for (int e = 0; e < 4; ++e) {
        const int row = l / 4 + e / 2 * 8, column = 2 * (l % 4) + e % 2;
        float sum = sums[e];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        sums[e] = sum;
      }
    }
  });
}

inline float shuffle_xor(float value, int lanes) {
  float result = value;
  struct Exchange {
    float in;
    float* out;
  } own{value, &result};
  emulation::meet(emulation::warp(), static_cast<int>(emulation::lane()), &own, [lanes](void** all) {
    for (int l = 0; l < 32; ++l)
      *static_cast<Exchange*>(all[l])->out = static_cast<Exchange*>(all[l ^ lanes])->in;
  });
  return result;
}

}  // namespace cosmos

#endif /* COSMOS_EMULATION_PRIMITIVES_H */
