/* CPU library: the colour half of the augmentation on uint8 crops [N, 3, H, W], in place: the bits that PIL gives.
 *
 * All of a crop's operations run while it lies in the cache; planes are worked on in runs that the compiler turns into
 * vectors. Crops are shared out among threads: results depend on neither threads nor instruction set.
 */
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cosmos.h"

/* Not for AVX-512: what is done here is done to bytes, for which its first set has nothing. */
#ifdef COSMOS_TARGET_CLONES
#define COSMOS_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define COSMOS_CLONES
#endif

/* Beside each of the N crops: kSlots jitters in order, -1 for none; see ColorNumbers of cosmos_fast/ops/recolor.py. */
struct CosmosRecolor {
  const int64_t* order;
  const float* amount;
  const uint8_t* gray;
  const float *blur_radius, *solarize_threshold;
  const uint8_t* flip;
  int64_t crops, height, width;
};

namespace {

enum Jitter : int64_t { kBrightness, kContrast, kSaturation, kHue };
constexpr int64_t kSlots = 4;
constexpr int64_t kRun = 256; /* pixels between two looks at the temporaries of a hue: they stay in the L1 cache */
constexpr int kBlurPasses = 3;

/* Room of one thread: one plane, and two lines with a margin on both sides. */
struct Room {
  uint8_t *plane, *line, *other;
};

COSMOS_INLINE uint8_t level(float x) {
  return static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(x, 0.0f), 255.0f)));
}

/* ITU-R 601 in 16-bit fixed point. */
COSMOS_INLINE int32_t luma(int32_t r, int32_t g, int32_t b) { return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16; }

/* Towards one level, or away from it. */
COSMOS_CLONES void blend(uint8_t* x, int64_t n, float level_of_none, float factor) {
  for (int64_t i = 0; i < n; ++i) x[i] = level(level_of_none + factor * (static_cast<float>(x[i]) - level_of_none));
}

COSMOS_CLONES int64_t sum_of_luma(const uint8_t* __restrict r, const uint8_t* __restrict g,
                                  const uint8_t* __restrict b, int64_t n) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) { /* a run's sum fits into 32 bits */
    const int64_t end = std::min(begin + kRun, n);
    int32_t part = 0;
    for (int64_t i = begin; i < end; ++i) part += luma(r[i], g[i], b[i]);
    total += part;
  }
  return total;
}

COSMOS_CLONES void saturate(uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b, int64_t n,
                            float factor) {
  for (int64_t i = 0; i < n; ++i) {
    const int32_t y = luma(r[i], g[i], b[i]);
    const float grey = static_cast<float>(y);
    r[i] = level(grey + factor * static_cast<float>(r[i] - y));
    g[i] = level(grey + factor * static_cast<float>(g[i] - y));
    b[i] = level(grey + factor * static_cast<float>(b[i] - y));
  }
}

COSMOS_CLONES void make_gray(uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) r[i] = g[i] = b[i] = static_cast<uint8_t>(luma(r[i], g[i], b[i]));
}

COSMOS_CLONES void solarize(uint8_t* x, int64_t n, uint8_t from) {
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] < from ? x[i] : static_cast<uint8_t>(255 - x[i]);
}

/* Hue, saturation and value of a run of pixels, 8 bits each; then back, the hue shifted. PIL goes through double
 * precision here and there; for all levels there are, single precision and whole numbers give the same. */
struct HsvRun {
  int32_t r[kRun], g[kRun], b[kRun];
  int32_t hue[kRun], saturation[kRun], value[kRun], low[kRun], middle[kRun];
};

COSMOS_INLINE void to_hsv(HsvRun& x, int32_t shift) {
  for (int64_t i = 0; i < kRun; ++i) {
    const int32_t r = x.r[i], g = x.g[i], b = x.b[i];
    const int32_t most = std::max(r, std::max(g, b)), least = std::min(r, std::min(g, b)), chroma = most - least;
    /* Masks of the brightest channel, one of the three; `?:` instead becomes branches, and no vectors. */
    const int32_t red = -(r == most), green = -(g == most) & ~red, blue = ~(red | green);
    const int32_t before = (b & red) | (r & green) | (g & blue), behind = (g & red) | (b & green) | (r & blue);
    const int32_t sextant = (2 & green) | (4 & blue), sign = before <= behind ? 1 : -1;
    const float distance = static_cast<float>(2 * most + least - r - g - b) / static_cast<float>(std::max(chroma, 1));
    const float turn = (static_cast<float>(sextant + sign) - static_cast<float>(sign) * distance) / 6.0f;
    x.hue[i] = (static_cast<int32_t>((turn < 0.0f ? turn + 1.0f : turn) * 255.0f) + shift) & 255;
    x.saturation[i] = static_cast<int32_t>(static_cast<float>(chroma) / static_cast<float>(std::max(most, 1)) * 255.0f);
    x.value[i] = most;
  }
}

COSMOS_INLINE int32_t over_255(int32_t x) { return (x + 1 + (x >> 8)) >> 8; } /* x / 255, for x up to 65534 */

/* Of three levels each channel gets one: the highest is the value, the lowest is grey's share of it, rounded. */
COSMOS_INLINE void to_rgb(HsvRun& x) {
  for (int64_t i = 0; i < kRun; ++i) {
    const int32_t hue = 6 * x.hue[i], sextant = over_255(hue), within = hue - 255 * sextant;
    const int32_t away = (sextant & 1) != 0 ? within : 255 - within; /* of the middle level from the highest */
    const int32_t share = x.value[i] * (255 * 255 - x.saturation[i] * away) + 255 * 255 / 2; /* below 2^24 */
    x.hue[i] = sextant == 6 ? 0 : sextant;
    x.low[i] = over_255(x.value[i] * (255 - x.saturation[i]) + 127);
    x.middle[i] = static_cast<int32_t>(static_cast<float>(share) / (255.0f * 255.0f));
  }
  for (int64_t i = 0; i < kRun; ++i) {
    const int32_t s = x.hue[i], high = x.value[i], low = x.low[i], middle = x.middle[i];
    x.r[i] = s == 0 || s == 5 ? high : s == 1 || s == 4 ? middle : low;
    x.g[i] = s == 1 || s == 2 ? high : s == 0 || s == 3 ? middle : low;
    x.b[i] = s == 3 || s == 4 ? high : s == 2 || s == 5 ? middle : low;
  }
}

COSMOS_CLONES void shift_hue(uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b, int64_t n,
                             int32_t shift) {
  HsvRun x = {};
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t count = std::min(kRun, n - begin);
    for (int64_t i = 0; i < count; ++i) {
      x.r[i] = r[begin + i];
      x.g[i] = g[begin + i];
      x.b[i] = b[begin + i];
    }
    to_hsv(x, shift); /* whole runs: what lies behind the last pixel is of an older one */
    to_rgb(x);
    for (int64_t i = 0; i < count; ++i) {
      r[begin + i] = static_cast<uint8_t>(x.r[i]);
      g[begin + i] = static_cast<uint8_t>(x.g[i]);
      b[begin + i] = static_cast<uint8_t>(x.b[i]);
    }
  }
}

/* A box of 2 half + 1 whole taps and two parts of a tap beside them, in 24-bit fixed point.
 *
 * Extended box blur (Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering",
 * 2011): three of them have exactly the variance that is asked for. Single precision where PIL has it. */
struct Box {
  int64_t half;
  uint32_t whole, end;

  explicit Box(float radius) {
    const float variance = radius * radius / static_cast<float>(kBlurPasses);
    const float length = static_cast<float>(std::sqrt(12.0 * static_cast<double>(variance) + 1.0));
    const float inner = static_cast<float>(std::floor((static_cast<double>(length) - 1.0) / 2.0));
    float part = (2.0f * inner + 1.0f) * (inner * (inner + 1.0f) - 3.0f * variance);
    part /= 6.0f * (variance - (inner + 1.0f) * (inner + 1.0f));
    const float box = inner + part;
    half = static_cast<int64_t>(box);
    whole = static_cast<uint32_t>(16777216.0f / (box * 2.0f + 1.0f));
    end = (16777216u - static_cast<uint32_t>(2 * half + 1) * whole) / 2;
  }
  int64_t reach() const { return half + 1; }
};

/* out[i] from taps[0][i] ... taps[2 half + 2][i]. */
template <int64_t Half>
COSMOS_INLINE void weigh(const uint8_t* const* taps, const Box& box, uint8_t* __restrict out, int64_t n) {
  const uint32_t whole = box.whole, end = box.end;
  const uint8_t* tap[2 * Half + 3];
  for (int64_t k = 0; k < 2 * Half + 3; ++k) tap[k] = taps[k];
  for (int64_t i = 0; i < n; ++i) {
    uint32_t sum = 0;
#pragma GCC unroll 5
    for (int64_t k = 1; k < 2 * Half + 2; ++k) sum += tap[k][i];
    const uint32_t ends = static_cast<uint32_t>(tap[0][i]) + tap[2 * Half + 2][i];
    out[i] = static_cast<uint8_t>((sum * whole + ends * end + (1u << 23)) >> 24);
  }
}

COSMOS_CLONES void weigh_taps(const uint8_t* const* taps, const Box& box, uint8_t* __restrict out, int64_t n) {
  if (box.half == 0) return weigh<0>(taps, box, out, n);
  if (box.half == 1) return weigh<1>(taps, box, out, n);
  const int64_t last = 2 * box.half + 2;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t count = std::min(kRun, n - begin);
    uint32_t sum[kRun] = {};
    for (int64_t k = 1; k < last; ++k)
      for (int64_t i = 0; i < count; ++i) sum[i] += taps[k][begin + i];
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t ends = static_cast<uint32_t>(taps[0][begin + i]) + taps[last][begin + i];
      out[begin + i] = static_cast<uint8_t>((sum[i] * box.whole + ends * box.end + (1u << 23)) >> 24);
    }
  }
}

/* Along the lines, out of place; `taps` is room for 2 half + 3 of them. */
void blur_lines(const uint8_t* x, uint8_t* out, int64_t height, int64_t width, const Box& box, const uint8_t** taps,
                const Room& room) {
  const int64_t reach = box.reach();
  const size_t margin = static_cast<size_t>(reach), length = static_cast<size_t>(width);
  for (int64_t y = 0; y < height; ++y) {
    uint8_t *from = room.line, *to = room.other;
    std::memcpy(from + reach, x + y * width, length);
    for (int pass = 0; pass < kBlurPasses; ++pass) {
      std::memset(from, from[reach], margin);
      std::memset(from + reach + width, from[reach + width - 1], margin);
      for (int64_t k = 0; k <= 2 * reach; ++k) taps[k] = from + k;
      weigh_taps(taps, box, to + reach, width);
      std::swap(from, to);
    }
    std::memcpy(out + y * width, from + reach, length);
  }
}

/* Across the lines, out of place. */
void blur_columns(const uint8_t* x, uint8_t* out, int64_t height, int64_t width, const Box& box, const uint8_t** taps) {
  const int64_t reach = box.reach();
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t k = 0; k <= 2 * reach; ++k)
      taps[k] = x + std::min(std::max<int64_t>(y + k - reach, 0), height - 1) * width;
    weigh_taps(taps, box, out + y * width, width);
  }
}

void blur(uint8_t* plane, int64_t height, int64_t width, const Box& box, const uint8_t** taps, const Room& room) {
  blur_lines(plane, room.plane, height, width, box, taps, room);
  uint8_t *from = room.plane, *to = plane;
  for (int pass = 0; pass < kBlurPasses; ++pass) { /* an odd number: it ends in the plane */
    blur_columns(from, to, height, width, box, taps);
    std::swap(from, to);
  }
}
static_assert(kBlurPasses % 2 == 1, "an even number ends in the other plane");

void jitter(uint8_t* crop, int64_t pixels, int64_t operation, float amount) {
  uint8_t *r = crop, *g = r + pixels, *b = g + pixels;
  switch (operation) {
    case kBrightness: return blend(crop, 3 * pixels, 0.0f, amount);
    case kContrast: {
      const double mean = static_cast<double>(sum_of_luma(r, g, b, pixels)) / static_cast<double>(pixels);
      return blend(crop, 3 * pixels, static_cast<float>(std::floor(mean + 0.5)), amount);
    }
    case kSaturation: return saturate(r, g, b, pixels, amount);
    case kHue: return shift_hue(r, g, b, pixels, static_cast<int32_t>(amount * 255.0f) & 255);
    default: return;
  }
}

void recolor(uint8_t* crop, const CosmosRecolor& t, int64_t row, const uint8_t** taps, const Room& room) {
  const int64_t pixels = t.height * t.width;
  for (int64_t slot = row * kSlots; slot < (row + 1) * kSlots; ++slot)
    jitter(crop, pixels, t.order[slot], t.amount[slot]);
  if (t.gray[row] != 0) make_gray(crop, crop + pixels, crop + 2 * pixels, pixels);
  if (t.blur_radius[row] > 0.0f) {
    const Box box(t.blur_radius[row]);
    for (int64_t plane = 0; plane < 3; ++plane) blur(crop + plane * pixels, t.height, t.width, box, taps, room);
  }
  if (t.solarize_threshold[row] < 256.0f) {
    const float from = std::ceil(std::max(t.solarize_threshold[row], 0.0f));
    if (from < 256.0f) solarize(crop, 3 * pixels, static_cast<uint8_t>(from));
  }
  if (t.flip[row] != 0)
    for (uint8_t* line = crop; line < crop + 3 * pixels; line += t.width) std::reverse(line, line + t.width);
}

int64_t widest_reach(const CosmosRecolor& t) {
  float most = 0.0f;
  for (int64_t row = 0; row < t.crops; ++row) most = std::max(most, t.blur_radius[row]);
  return Box(most).reach();
}

int64_t thread_number() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace

/* pixels: uint8 [crops, 3, height, width], contiguous. */
COSMOS_EXPORT int32_t cosmos_recolor_cpu(const CosmosRecolor* table, uint8_t* pixels, int32_t threads) {
  if (table == nullptr || threads < 1 || table->crops < 0 || table->height < 1 || table->width < 1)
    return COSMOS_BAD_ARGUMENT;
  const CosmosRecolor t = *table;
  const int64_t size = 3 * t.height * t.width, reach = widest_reach(t), line = t.width + 2 * reach;
  const int64_t bytes = t.height * t.width + 2 * line;
  try { /* no thread may throw: all room is taken before */
    std::vector<uint8_t> room(static_cast<size_t>(threads * bytes));
    std::vector<const uint8_t*> taps(static_cast<size_t>(threads * (2 * reach + 1)));
    const auto work = [&](int64_t row) {
      uint8_t* own = room.data() + thread_number() * bytes;
      uint8_t* lines = own + t.height * t.width;
      recolor(pixels + row * size, t, row, taps.data() + thread_number() * (2 * reach + 1), {own, lines, lines + line});
    };
    if (threads == 1) { /* a worker process: OpenMP may not be used after a fork */
      for (int64_t row = 0; row < t.crops; ++row) work(row);
    } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
      for (int64_t row = 0; row < t.crops; ++row) work(row);
    }
  } catch (const std::bad_alloc&) {
    return COSMOS_NO_MEMORY;
  }
  return COSMOS_OK;
}
