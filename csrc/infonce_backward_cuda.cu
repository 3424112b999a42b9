/* CUDA library: backward of the multi-view contrastive loss, on the tensor cores of sm_80 and later.
 *
 * Two launches a chunk: `gradient_kernel` writes g, `product_kernel` multiplies it by the columns and, where wanted, its
 * transpose by the rows. Three matrix products in all, or two: what the loss needs at least.
 */
#include "infonce_backward.h"
#include "launch.h"
#include "tile_product.h"

namespace cosmos {
namespace {

/* Shared memory of the gradient tile after its product: g as 16-bit elements, then factors of rows and columns. */
struct GradientFactors {
  float row[kTile], column[kTile];
};
static_assert(kTile * kTile * 2 + sizeof(GradientFactors) <= kProductBytes, "shared memory");

__device__ __forceinline__ float finite_or_low(float x) { return x < INFINITY ? x : -INFINITY; }

/* exp(s - row_lse) + exp(s - col_lse) = 2^(s' - t) (2^(t - r) + 2^(t - c)), with s', r, c in units of log2 and t the
 * largest r or c of the tile: as s' <= min(r, c), nothing overflows, and what the first factor loses below 2^-126 is
 * below 2^-66 as long as no r or c is kSharedRange smaller than t. Else each term takes its own exponential.
 * An infinite r or c is a term that does not exist: its factor is 0 either way.
 * Leaves the two factors, or r and c, in `factors`, times the gradient's unit; returns t, or NaN for "own exponentials".
 */
template <Dtype kType>
__device__ __forceinline__ float gradient_factors(GradientFactors& factors, const InfoncePlan& plan, ViewTile row,
                                                  ViewTile column) {
  const CosmosInfonceShape& shape = plan.shape;
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31;
  const int64_t rows = shape.rows - row.first, columns = shape.columns - column.first;
  /* Beyond the ragged end: the last one again, which changes neither maximum nor minimum. */
  const int64_t at_row = row.first + least(thread, rows - 1), at_column = column.first + least(thread, columns - 1);
  const float r = kLog2e * plan.tensors.row_lse[(row.view * shape.rows + at_row) * shape.column_views + column.view];
  const float c =
      kLog2e * plan.tensors.col_lse[(row.view * shape.column_views + column.view) * shape.columns + at_column];
  factors.row[thread] = r;
  factors.column[thread] = c;
  __syncthreads();
  float high = -INFINITY, low = INFINITY;
#pragma unroll
  for (int i = lane; i < kTile; i += 32) {
    high = fmaxf(high, fmaxf(finite_or_low(factors.row[i]), finite_or_low(factors.column[i])));
    low = fminf(low, fminf(factors.row[i], factors.column[i]));
  }
  high = lanes_max<32>(high);
  low = lanes_min<32>(low);
  __syncthreads(); /* all have read before any writes */
  const bool shared = high - low <= kSharedRange;
  if (shared) {
    factors.row[thread] = kGradientUnit<kType> * exp2_fast(high - r);
    factors.column[thread] = kGradientUnit<kType> * exp2_fast(high - c);
  }
  __syncthreads();
  return shared ? high : NAN;
}

/* g of one tile of 128 x 128 into the workspace. */
template <Dtype kType>
__global__ void __launch_bounds__(kTileThreads, 2) gradient_kernel(const InfoncePlan plan) {
  const CosmosInfonceShape& shape = plan.shape;
  const int tile = static_cast<int>(blockIdx.x);
  const int row_tile = tile % plan.row_tiles, column_tile = tile / plan.row_tiles;
  const ViewTile row = view_tile(plan.first_row_tile + row_tile, plan.row_tiles_a_view, kTile);
  const ViewTile column = view_tile(plan.first_column_tile + column_tile, plan.column_tiles_a_view, kTile);
  const int rows = least(kTile, shape.rows - row.first), columns = least(kTile, shape.columns - column.first);
  const int dim = static_cast<int>(shape.dim);
  const uint16_t* x = static_cast<const uint16_t*>(plan.tensors.rows) + (row.view * shape.rows + row.first) * dim;
  const uint16_t* y =
      static_cast<const uint16_t*>(plan.tensors.columns) + (column.view * shape.columns + column.first) * dim;

  TileSums sums;
  tile_product<kType, Layout::kAlongK, Layout::kAlongK>(
      sums, (dim + kStep - 1) / kStep,
      [&](int step) { return Strip{x + step * kStep, rows, dim - step * kStep}; }, dim,
      [&](int step) { return Strip{y + step * kStep, columns, dim - step * kStep}; }, dim);

  unsigned char* shared = shared_memory();
  auto& factors = *reinterpret_cast<GradientFactors*>(shared + kTile * kTile * 2);
  const float shift = gradient_factors<kType>(factors, plan, row, column);
  const bool one_exponential = shift == shift;
  const float scale = kLog2e * *plan.tensors.scale;
  const int diagonal = static_cast<int>(shape.offset + row.first - column.first); /* column - row of the positives */
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int i = TileSums::row(m, e);
      const float row_factor = factors.row[i];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int j = TileSums::column(n, e);
        float g[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const float s = scale * sums.value[m][n][e + side], column_factor = factors.column[j + side];
          g[side] = one_exponential
                        ? exp2_fast(s - shift) * (row_factor + column_factor)
                        : kGradientUnit<kType> * (exp2_fast(s - row_factor) + exp2_fast(s - column_factor));
          if (j + side - i == diagonal) g[side] -= 2.0f * kGradientUnit<kType>;
          if (i >= rows || j + side >= columns) g[side] = 0.0f;
        }
        *reinterpret_cast<uint32_t*>(shared + strip_offset<Layout::kAcrossK>(i, j >> 3) + (j & 7) * 2) =
            pack<kType>(g[0], g[1]);
      }
    }
  }
  __syncthreads();
  const int64_t stride = static_cast<int64_t>(plan.column_tiles) * kTile;
  uint16_t* out = plan.gradient + row_tile * kTile * stride + column_tile * kTile;
#pragma unroll 4
  for (int index = static_cast<int>(threadIdx.x); index < kTile * kTile / 8; index += kTileThreads) {
    const int i = index / (kTile / 8), chunk = index % (kTile / 8);
    *reinterpret_cast<uint4*>(out + i * stride + chunk * 8) =
        *reinterpret_cast<const uint4*>(shared + strip_offset<Layout::kAcrossK>(i, chunk));
  }
}

/* Adds a tile of sums to `out`, of which `rows` rows and `width` columns exist, or starts it. */
template <Dtype kType>
__device__ __forceinline__ void add_sums(const TileSums& sums, float* out, int64_t stride, int rows, int width,
                                         bool start) {
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int i = TileSums::row(m, e);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int j = TileSums::column(n, e);
        if (i >= rows || j >= width) continue;
        float2* at = reinterpret_cast<float2*>(out + i * stride + j);
        float2 total = start ? float2{0.0f, 0.0f} : *at;
        total.x += sums.value[m][n][e] * (1.0f / kGradientUnit<kType>);
        total.y += sums.value[m][n][e + 1] * (1.0f / kGradientUnit<kType>);
        *at = total;
      }
    }
  }
}

/* grad_rows of the chunk's rows += g y, a tile of 128 rows x 128 features. */
template <Dtype kType>
__device__ __forceinline__ void row_product(const InfoncePlan& plan, int row_tile, int feature) {
  const CosmosInfonceShape& shape = plan.shape;
  const int dim = static_cast<int>(shape.dim);
  const ViewTile row = view_tile(plan.first_row_tile + row_tile, plan.row_tiles_a_view, kTile);
  const int64_t stride = static_cast<int64_t>(plan.column_tiles) * kTile;
  const uint16_t* g = plan.gradient + row_tile * kTile * stride;
  const uint16_t* y = static_cast<const uint16_t*>(plan.tensors.columns) + feature;
  constexpr int kSteps = kTile / kStep; /* of a column tile */
  TileSums sums;
  tile_product<kType, Layout::kAlongK, Layout::kAcrossK>(
      sums, plan.column_tiles * kSteps, [&](int step) { return Strip{g + step * kStep, kTile, kStep}; }, stride,
      [&](int step) {
        const ViewTile at = view_tile(plan.first_column_tile + step / kSteps, plan.column_tiles_a_view, kTile);
        const int64_t column = at.first + step % kSteps * kStep;
        const int valid = least(kStep, shape.columns - column);
        return Strip{valid > 0 ? y + (at.view * shape.columns + column) * dim : y, valid, dim - feature};
      },
      dim);
  float* out = plan.tensors.grad_rows + (row.view * shape.rows + row.first) * dim + feature;
  add_sums<kType>(sums, out, dim, least(kTile, shape.rows - row.first), dim - feature, plan.first_columns);
}

/* grad_columns of the chunk's columns += g^T x. */
template <Dtype kType>
__device__ __forceinline__ void column_product(const InfoncePlan& plan, int column_tile, int feature) {
  const CosmosInfonceShape& shape = plan.shape;
  const int dim = static_cast<int>(shape.dim);
  const ViewTile column = view_tile(plan.first_column_tile + column_tile, plan.column_tiles_a_view, kTile);
  const int64_t stride = static_cast<int64_t>(plan.column_tiles) * kTile;
  const uint16_t* g = plan.gradient + column_tile * kTile;
  const uint16_t* x = static_cast<const uint16_t*>(plan.tensors.rows) + feature;
  constexpr int kSteps = kTile / kStep;
  TileSums sums;
  tile_product<kType, Layout::kAcrossK, Layout::kAcrossK>(
      sums, plan.row_tiles * kSteps, [&](int step) { return Strip{g + step * kStep * stride, kStep, kTile}; }, stride,
      [&](int step) {
        const ViewTile at = view_tile(plan.first_row_tile + step / kSteps, plan.row_tiles_a_view, kTile);
        const int64_t row = at.first + step % kSteps * kStep;
        const int valid = least(kStep, shape.rows - row);
        return Strip{valid > 0 ? x + (at.view * shape.rows + row) * dim : x, valid, dim - feature};
      },
      dim);
  float* out = plan.tensors.grad_columns + (column.view * shape.columns + column.first) * dim + feature;
  add_sums<kType>(sums, out, dim, least(kTile, shape.columns - column.first), dim - feature, plan.first_rows);
}

/* Both products read the same g and need nothing of each other: one launch fills the device better than two. */
template <Dtype kType>
__global__ void __launch_bounds__(kTileThreads, 2) product_kernel(const InfoncePlan plan) {
  const int block = static_cast<int>(blockIdx.x), row_blocks = plan.row_tiles * plan.dim_tiles;
  if (block < row_blocks) {
    row_product<kType>(plan, block / plan.dim_tiles, block % plan.dim_tiles * kTile);
  } else {
    const int rest = block - row_blocks;
    column_product<kType>(plan, rest / plan.dim_tiles, rest % plan.dim_tiles * kTile);
  }
}

template <Dtype kType>
int32_t run_chunk(const InfoncePlan& plan, void* stream) {
  const int64_t tiles = static_cast<int64_t>(plan.row_tiles) * plan.column_tiles;
  const int32_t status = launch(gradient_kernel<kType>, tiles, kTileThreads, kProductBytes, stream, plan);
  if (status != COSMOS_OK) return status;
  const int outputs = plan.row_tiles + (plan.tensors.grad_columns != nullptr ? plan.column_tiles : 0);
  return launch(product_kernel<kType>, static_cast<int64_t>(outputs) * plan.dim_tiles, kTileThreads, kProductBytes,
                stream, plan);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kTileBytes = kTile * kTile * 2;
constexpr int64_t kMostTiles = 1024; /* 32 MiB: stays in the L2 cache of an A100 (40 MB) or H100, H200 (50 MB) */

bool valid(const CosmosInfonceShape* s) {
  return s != nullptr && s->row_views > 0 && s->rows > 0 && s->column_views > 0 && s->columns > 0 && s->dim > 0 &&
         s->dim % 8 == 0 && s->dim <= (1 << 20) && s->offset >= 0 && s->offset + s->rows <= s->columns &&
         s->row_views * s->rows < (INT64_C(1) << 30) && s->column_views * s->columns < (INT64_C(1) << 30);
}

int64_t all_row_tiles(const CosmosInfonceShape& s) { return s.row_views * ceil_div(s.rows, kTile); }
int64_t all_column_tiles(const CosmosInfonceShape& s) { return s.column_views * ceil_div(s.columns, kTile); }

/* Row tiles of a chunk: as many as give every multiprocessor two blocks of the second launch. */
int64_t chunk_row_tiles(const InfoncePlan& plan, int multiprocessors, int64_t tiles) {
  const int64_t wanted = (plan.tensors.grad_columns != nullptr ? 1 : 2) * multiprocessors / plan.dim_tiles;
  const int64_t most = all_row_tiles(plan.shape);
  int64_t chunk = wanted < 1 ? 1 : wanted;
  if (chunk > tiles) chunk = tiles;
  if (chunk > most) chunk = most;
  return ceil_div(most, ceil_div(most, chunk)); /* chunks of equal size */
}

template <Dtype kType>
int32_t run(InfoncePlan plan, int64_t tiles, int multiprocessors, void* stream) {
  const int64_t rows = all_row_tiles(plan.shape), columns = all_column_tiles(plan.shape);
  const int64_t row_chunk = chunk_row_tiles(plan, multiprocessors, tiles);
  const int64_t most = tiles / row_chunk < columns ? tiles / row_chunk : columns;
  const int64_t column_chunk = ceil_div(columns, ceil_div(columns, most));
  for (int64_t row = 0; row < rows; row += row_chunk) {
    for (int64_t column = 0; column < columns; column += column_chunk) {
      plan.first_row_tile = static_cast<int>(row);
      plan.row_tiles = least(row_chunk, rows - row);
      plan.first_column_tile = static_cast<int>(column);
      plan.column_tiles = least(column_chunk, columns - column);
      plan.first_columns = column == 0;
      plan.first_rows = row == 0;
      const int32_t status = run_chunk<kType>(plan, stream);
      if (status != COSMOS_OK) return status;
    }
  }
  return COSMOS_OK;
}

}  // namespace
}  // namespace cosmos

/* Bytes of workspace with which the call below runs best; it runs with anything from 32 KiB on. */
COSMOS_EXPORT int64_t cosmos_infonce_backward_workspace(const CosmosInfonceShape* shape) {
  using namespace cosmos;
  if (!valid(shape)) return COSMOS_BAD_ARGUMENT;
  const int64_t all = all_row_tiles(*shape) * all_column_tiles(*shape);
  return (all < kMostTiles ? all : kMostTiles) * kTileBytes;
}

/* dtype: 0 for fp16, 1 for bf16 features. workspace: device memory, aligned to 16 bytes. Asynchronous on `stream`, on
 * the current device. Returns COSMOS_OK, COSMOS_BAD_ARGUMENT or a cudaError_t. */
COSMOS_EXPORT int32_t cosmos_infonce_backward(const CosmosInfonceShape* shape, const CosmosInfonceTensors* tensors,
                                              int32_t dtype, void* workspace, int64_t workspace_bytes, void* stream) {
  using namespace cosmos;
  const int64_t tiles = workspace_bytes / kTileBytes;
  if (!valid(shape) || tensors == nullptr || workspace == nullptr || tiles < 1 || dtype < 0 || dtype > 1)
    return COSMOS_BAD_ARGUMENT;
  DeviceFigures device;
  const int32_t status = device_figures(&device);
  if (status != COSMOS_OK) return status;
  InfoncePlan plan{};
  plan.shape = *shape;
  plan.tensors = *tensors;
  plan.gradient = static_cast<uint16_t*>(workspace);
  plan.row_tiles_a_view = static_cast<int>(ceil_div(shape->rows, kTile));
  plan.column_tiles_a_view = static_cast<int>(ceil_div(shape->columns, kTile));
  plan.dim_tiles = static_cast<int>(ceil_div(shape->dim, kTile));
  return static_cast<Dtype>(dtype) == Dtype::kHalf ? run<Dtype::kHalf>(plan, tiles, device.multiprocessors, stream)
                                                   : run<Dtype::kBfloat16>(plan, tiles, device.multiprocessors, stream);
}
