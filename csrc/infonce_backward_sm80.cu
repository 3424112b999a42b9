/* Kernels of the contrastive backward for the tensor cores of sm_80 and later (mma.sync). */
#include "infonce_gradient.h"
#include "launch.h"
#include "tile_product.h"

namespace cosmos {
namespace {

using Factors = GradientFactors<kTile, kTile>;
static_assert(kTile * kTile * 2 + sizeof(Factors) <= kProductBytes, "g, then factors, where the operands were");

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
  auto& factors = *reinterpret_cast<Factors*>(shared + kTile * kTile * 2);
  const float shift = gradient_factors<kType, kTileThreads>(factors, plan, row, column, static_cast<int>(threadIdx.x),
                                                            [] { __syncthreads(); });
  const GradientOfLogits<kType> gradient(plan, shift, row, column, rows, columns);
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int i = TileSums::row(m, e);
      const float factor = factors.row[i];
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int j = TileSums::column(n, e);
        const float first = gradient(sums.value[m][n][e], factor, factors.column[j], i, j);
        const float second = gradient(sums.value[m][n][e + 1], factor, factors.column[j + 1], i, j + 1);
        *reinterpret_cast<uint32_t*>(shared + strip_offset<Layout::kAcrossK>(i, j >> 3) + (j & 7) * 2) =
            pack<kType>(first, second);
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
        if (i < rows && j < width)
          add_pair<kType>(out + i * stride + j, sums.value[m][n][e], sums.value[m][n][e + 1], start);
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

}  // namespace

int32_t run_chunk_sm80(const InfoncePlan& plan, Dtype dtype, void* stream) {
  return dtype == Dtype::kHalf ? run_chunk<Dtype::kHalf>(plan, stream) : run_chunk<Dtype::kBfloat16>(plan, stream);
}

}  // namespace cosmos
