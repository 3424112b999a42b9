/* Matrix products of a few dozen rows and columns in fp32, for one thread, with operands in the cache.
 *
 *     C [m, n] = A [m, k] B [k, n],  n a multiple of 8
 *
 * A is read one element at a time, so that it may lie in any strides (a transpose costs nothing); rows of B and C are
 * contiguous. Compiled once for each COSMOS_ISA, in a namespace of that name: vectors of 8 are one register with AVX, two
 * with SSE or NEON.
 */
#ifndef COSMOS_SMALL_PRODUCTS_H
#define COSMOS_SMALL_PRODUCTS_H

#include <cstdint>
#include <cstring>

#include "cosmos.h"

namespace cosmos {
namespace COSMOS_ISA {

constexpr int64_t kLanes = 8;
typedef float Vec __attribute__((vector_size(32)));
typedef int32_t IntVec __attribute__((vector_size(32)));
typedef float LooseVec __attribute__((vector_size(32), aligned(4), may_alias));

COSMOS_INLINE Vec load(const float* x) { return *reinterpret_cast<const LooseVec*>(x); }
COSMOS_INLINE void store(float* x, const Vec& v) { *reinterpret_cast<LooseVec*>(x) = v; }
COSMOS_INLINE Vec fill(float x) { return Vec{x, x, x, x, x, x, x, x}; }

COSMOS_INLINE float sum(const Vec& v) {
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

COSMOS_INLINE int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

/* Element (i, k) at x[i * row + k * column]. */
struct Strided {
  const float* x;
  int64_t row, column;
};

template <int Rows, int Vectors>
COSMOS_INLINE void tile(const Strided& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t k) {
  Vec total[Rows][Vectors] = {};
  for (int64_t step = 0; step < k; ++step) {
    Vec of_b[Vectors];
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) of_b[j] = load(b + step * b_row + j * kLanes);
#pragma GCC unroll 6
    for (int i = 0; i < Rows; ++i) {
      const Vec of_a = fill(a.x[i * a.row + step * a.column]);
#pragma GCC unroll 2
      for (int j = 0; j < Vectors; ++j) total[i][j] += of_a * of_b[j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) store(c + i * c_row + j * kLanes, total[i][j]);
}

/* 6 x 16 results at a time: 12 of the 16 registers of AVX. */
template <int Vectors>
COSMOS_INLINE void columns(Strided a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m, int64_t k) {
  for (; m >= 6; m -= 6, a.x += 6 * a.row, c += 6 * c_row) tile<6, Vectors>(a, b, b_row, c, c_row, k);
  switch (m) {
    case 5: return tile<5, Vectors>(a, b, b_row, c, c_row, k);
    case 4: return tile<4, Vectors>(a, b, b_row, c, c_row, k);
    case 3: return tile<3, Vectors>(a, b, b_row, c, c_row, k);
    case 2: return tile<2, Vectors>(a, b, b_row, c, c_row, k);
    case 1: return tile<1, Vectors>(a, b, b_row, c, c_row, k);
    default: return;
  }
}

COSMOS_INLINE void product(const Strided& a, const float* b, int64_t b_row, float* c, int64_t c_row, int64_t m,
                           int64_t n, int64_t k) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) columns<2>(a, b + j, b_row, c + j, c_row, m, k);
  if (j < n) columns<1>(a, b + j, b_row, c + j, c_row, m, k);
}

#ifdef __clang__
#define COSMOS_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else /* GCC knows the other from version 12 on */
#define COSMOS_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, IntVec{__VA_ARGS__})
#endif
#define COSMOS_PAIR(name, ...) \
  COSMOS_INLINE Vec name(const Vec& x, const Vec& y) { return COSMOS_SHUFFLE(x, y, __VA_ARGS__); }
COSMOS_PAIR(even_singles, 0, 8, 1, 9, 4, 12, 5, 13)
COSMOS_PAIR(odd_singles, 2, 10, 3, 11, 6, 14, 7, 15)
COSMOS_PAIR(even_pairs, 0, 1, 8, 9, 4, 5, 12, 13)
COSMOS_PAIR(odd_pairs, 2, 3, 10, 11, 6, 7, 14, 15)
COSMOS_PAIR(low_halves, 0, 1, 2, 3, 8, 9, 10, 11)
COSMOS_PAIR(high_halves, 4, 5, 6, 7, 12, 13, 14, 15)
#undef COSMOS_PAIR
#undef COSMOS_SHUFFLE

/* 8 x 8 in registers: x, rows `row` apart -> out, rows `out_row` apart. */
COSMOS_INLINE void transpose_tile(const float* x, int64_t row, float* out, int64_t out_row) {
  Vec rows[8], mixed[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) rows[i] = load(x + i * row);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    mixed[i] = even_singles(rows[i], rows[i + 1]);
    mixed[i + 1] = odd_singles(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = even_pairs(mixed[i + j], mixed[i + j + 2]);
      rows[i + 2 * j + 1] = odd_pairs(mixed[i + j], mixed[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store(out + i * out_row, low_halves(rows[i], rows[i + 4]));
    store(out + (i + 4) * out_row, high_halves(rows[i], rows[i + 4]));
  }
}

/* x [rows, width], rows `row` apart, width a multiple of 8 -> out [width, round_up(rows)], the added columns zero. */
COSMOS_INLINE void transpose(const float* x, int64_t row, int64_t rows, int64_t width, float* out) {
  const int64_t out_row = round_up(rows), whole = rows / kLanes * kLanes;
  for (int64_t r = 0; r < whole; r += kLanes)
    for (int64_t c = 0; c < width; c += kLanes) transpose_tile(x + r * row + c, row, out + c * out_row + r, out_row);
  if (whole == rows) return;
  for (int64_t c = 0; c < width; c += kLanes) {
    float rest[kLanes * kLanes] = {};
    for (int64_t r = whole; r < rows; ++r) store(rest + (r - whole) * kLanes, load(x + r * row + c));
    transpose_tile(rest, kLanes, out + c * out_row + whole, out_row);
  }
}

/* out [rows, rounded up] <- x [rows, width] y [width]: a product with one column; the added results are zero. */
COSMOS_INLINE void dots(const float* x, int64_t row, int64_t rows, int64_t width, const float* y, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    Vec total = {};
    for (int64_t c = 0; c < width; c += kLanes) total += load(x + r * row + c) * load(y + c);
    out[r] = sum(total);
  }
  for (int64_t r = rows; r < round_up(rows); ++r) out[r] = 0.0f;
}

COSMOS_INLINE float largest(const float* x, int64_t n) {
  Vec most = fill(x[0]);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec next = load(x + i);
    most = most < next ? next : most;
  }
  float found = most[0];
  for (int j = 1; j < kLanes; ++j) found = found < most[j] ? most[j] : found;
  for (; i < n; ++i) found = found < x[i] ? x[i] : found;
  return found;
}

/* e^x for x <= 0, within 2 ulp; below -87, where e^x leaves the normal numbers, e^-87. NaN stays NaN. */
COSMOS_INLINE Vec exp_of_negative(const Vec& given) {
  const Vec x = given < fill(-87.0f) ? fill(-87.0f) : given;
  const Vec magic = fill(12582912.0f); /* 1.5 * 2^23: adding it rounds to the nearest whole number */
  const Vec shifted = x * fill(1.44269504088896341f) + magic;
  const Vec whole = shifted - magic;
  const Vec r = x - whole * fill(0.693359375f) - whole * fill(-2.12194440e-4f); /* ln 2 in two parts */
  Vec p = fill(1.0f / 5040);
  p = p * r + fill(1.0f / 720);
  p = p * r + fill(1.0f / 120);
  p = p * r + fill(1.0f / 24);
  p = p * r + fill(1.0f / 6);
  p = p * r + fill(0.5f);
  p = p * r * r + r + fill(1.0f);
  IntVec power, bits;
  std::memcpy(&power, &shifted, sizeof(power));
  std::memcpy(&bits, &p, sizeof(bits));
  bits += power << 23; /* times 2^whole; the bits of the magic number leave on the left */
  Vec result;
  std::memcpy(&result, &bits, sizeof(result));
  return given != given ? given : result;
}

}  // namespace COSMOS_ISA
}  // namespace cosmos

#endif /* COSMOS_SMALL_PRODUCTS_H */
