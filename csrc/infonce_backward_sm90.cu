/* Kernels of the contrastive backward for the tensor cores of compute capability 9.0 (wgmma). Code for sm_90a only.
 *
 * The same two launches as infonce_backward_sm80.cu with tiles of 128 x 256.
 */
#include "infonce_gradient.h"
#include "launch.h"
#include "warpgroup_tile.h"

namespace cosmos {
namespace sm90 {

using Factors = GradientFactors<kLeftRows, kRightRows>;

struct Extras { /* behind the stages */
  Barriers barriers;
  Factors factors;
};
inline constexpr int kSharedBytes = kStages * kStageBytes + static_cast<int>(sizeof(Extras));
static_assert(kLeftRows * kRightRows * 2 <= kStages * kStageBytes, "g where the operands were");

/* 65536 registers: 128 x 56 for the loaders, 256 x 224 for the multipliers. */
inline constexpr int kLoaderRegisters = 56;
inline constexpr int kMultiplierRegisters = 224;

__device__ __forceinline__ Extras& extras() {
  return *reinterpret_cast<Extras*>(shared_memory() + kStages * kStageBytes);
}

/* Offset of 16-byte chunk `chunk` of row `row` of g in shared memory. */
__device__ __forceinline__ int gradient_offset(int row, int chunk) {
  return row * (kRightRows * 2) + ((chunk ^ (row & 7)) << 4);
}

}  // namespace sm90

namespace {

using namespace sm90;

/* g of one tile of 128 x 256 into the workspace. */
template <Dtype kType>
__device__ __forceinline__ void gradient(const InfoncePlan& plan) {
  const CosmosInfonceShape& shape = plan.shape;
  const int tile = static_cast<int>(blockIdx.x);
  const int row_tile = tile % plan.row_tiles, column_tile = tile / plan.row_tiles;
  const ViewTile row = view_tile(plan.first_row_tile + row_tile, plan.row_tiles_a_view, kLeftRows);
  const ViewTile column = view_tile(plan.first_column_tile + column_tile, plan.column_tiles_a_view, kRightRows);
  const int rows = least(kLeftRows, shape.rows - row.first), columns = least(kRightRows, shape.columns - column.first);
  const int dim = static_cast<int>(shape.dim), steps = (dim + kStep - 1) / kStep;
  Barriers& barriers = extras().barriers;
  barriers.start();

  if (threadIdx.x < kThreads - kMultipliers) {
    give_registers<kLoaderRegisters>();
    const uint16_t* x = static_cast<const uint16_t*>(plan.tensors.rows) + (row.view * shape.rows + row.first) * dim;
    const uint16_t* y =
        static_cast<const uint16_t*>(plan.tensors.columns) + (column.view * shape.columns + column.first) * dim;
    load_tile<Layout::kAlongK, Layout::kAlongK>(
        barriers, steps, [&](int step) { return Strip{x + step * kStep, rows, dim - step * kStep}; }, dim,
        [&](int step) { return Strip{y + step * kStep, columns, dim - step * kStep}; }, dim);
  } else {
    take_registers<kMultiplierRegisters>();
    const int thread = static_cast<int>(threadIdx.x) - (kThreads - kMultipliers);
    Factors& factors = extras().factors;
    const float shift = gradient_factors<kType, kMultipliers>(factors, plan, row, column, thread,
                                                              [] { sync_threads<1, kMultipliers>(); });
    Sums sums;
    multiply_tile<kType, Layout::kAlongK, Layout::kAlongK>(sums, barriers, steps);
    const GradientOfLogits<kType> gradient_of(plan, shift, row, column, rows, columns);
    unsigned char* shared = shared_memory();
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int i = Sums::row(e);
      const float factor = factors.row[i];
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        const int j = Sums::column(n, e);
        const float first = gradient_of(sums.value[n * 4 + e], factor, factors.column[j], i, j);
        const float second = gradient_of(sums.value[n * 4 + e + 1], factor, factors.column[j + 1], i, j + 1);
        *reinterpret_cast<uint32_t*>(shared + gradient_offset(i, j >> 3) + (j & 7) * 2) = pack<kType>(first, second);
      }
    }
    sync_threads<1, kMultipliers>();
    const int64_t stride = static_cast<int64_t>(plan.column_tiles) * kRightRows;
    uint16_t* out = plan.gradient + row_tile * kLeftRows * stride + column_tile * kRightRows;
#pragma unroll 4
    for (int index = thread; index < kLeftRows * kRightRows / 8; index += kMultipliers) {
      const int i = index / (kRightRows / 8), chunk = index % (kRightRows / 8);
      *reinterpret_cast<uint4*>(out + i * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(shared + gradient_offset(i, chunk));
    }
  }
}

/* Adds the tile left(step) right(step), summed over steps, to `out`, of which `rows` rows and `width` columns exist. */
template <Dtype kType, Layout kLeft, typename Left, typename Right>
__device__ __forceinline__ void add_product(int steps, const Left& left, int64_t left_stride, const Right& right,
                                            int64_t dim, float* out, int rows, int width, bool start) {
  Barriers& barriers = extras().barriers;
  barriers.start();
  if (threadIdx.x < kThreads - kMultipliers) {
    give_registers<kLoaderRegisters>();
    load_tile<kLeft, Layout::kAcrossK>(barriers, steps, left, left_stride, right, dim);
  } else {
    take_registers<kMultiplierRegisters>();
    Sums sums;
    multiply_tile<kType, kLeft, Layout::kAcrossK>(sums, barriers, steps);
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int i = Sums::row(e);
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        const int j = Sums::column(n, e);
        if (i < rows && j < width)
          add_pair<kType>(out + i * dim + j, sums.value[n * 4 + e], sums.value[n * 4 + e + 1], start);
      }
    }
  }
}

/* grad_rows of the chunk's rows += g y: a block has 128 rows x 256 features. */
template <Dtype kType>
__device__ __forceinline__ void row_product(const InfoncePlan& plan) {
  const CosmosInfonceShape& shape = plan.shape;
  const int row_tile = static_cast<int>(blockIdx.x) / plan.dim_tiles;
  const int feature = static_cast<int>(blockIdx.x) % plan.dim_tiles * kRightRows, dim = static_cast<int>(shape.dim);
  const ViewTile row = view_tile(plan.first_row_tile + row_tile, plan.row_tiles_a_view, kLeftRows);
  const int64_t stride = static_cast<int64_t>(plan.column_tiles) * kRightRows;
  const uint16_t* g = plan.gradient + row_tile * kLeftRows * stride;
  const uint16_t* y = static_cast<const uint16_t*>(plan.tensors.columns) + feature;
  constexpr int kSteps = kRightRows / kStep; /* of a column tile */
  add_product<kType, Layout::kAlongK>(
      plan.column_tiles * kSteps, [&](int step) { return Strip{g + step * kStep, kLeftRows, kStep}; }, stride,
      [&](int step) {
        const ViewTile at = view_tile(plan.first_column_tile + step / kSteps, plan.column_tiles_a_view, kRightRows);
        const int64_t column = at.first + step % kSteps * kStep;
        const int valid = least(kStep, shape.columns - column);
        return Strip{valid > 0 ? y + (at.view * shape.columns + column) * dim : y, valid, dim - feature};
      },
      dim, plan.tensors.grad_rows + (row.view * shape.rows + row.first) * dim + feature,
      least(kLeftRows, shape.rows - row.first), dim - feature, plan.first_columns);
}

/* grad_columns of the chunk's columns += g^T x: a block has 128 columns x 256 features. */
template <Dtype kType>
__device__ __forceinline__ void column_product(const InfoncePlan& plan) {
  const CosmosInfonceShape& shape = plan.shape;
  const int block = static_cast<int>(blockIdx.x) / plan.dim_tiles; /* of 128 columns: two a column tile */
  const int feature = static_cast<int>(blockIdx.x) % plan.dim_tiles * kRightRows, dim = static_cast<int>(shape.dim);
  constexpr int kBlocks = kRightRows / kLeftRows;
  const ViewTile tile = view_tile(plan.first_column_tile + block / kBlocks, plan.column_tiles_a_view, kRightRows);
  const int first = tile.first + block % kBlocks * kLeftRows;
  if (first >= shape.columns) return;
  const int64_t stride = static_cast<int64_t>(plan.column_tiles) * kRightRows;
  const uint16_t* g = plan.gradient + block * kLeftRows;
  const uint16_t* x = static_cast<const uint16_t*>(plan.tensors.rows) + feature;
  constexpr int kSteps = kLeftRows / kStep; /* of a row tile */
  add_product<kType, Layout::kAcrossK>(
      plan.row_tiles * kSteps, [&](int step) { return Strip{g + step * kStep * stride, kStep, kLeftRows}; }, stride,
      [&](int step) {
        const ViewTile at = view_tile(plan.first_row_tile + step / kSteps, plan.row_tiles_a_view, kLeftRows);
        const int64_t row = at.first + step % kSteps * kStep;
        const int valid = least(kStep, shape.rows - row);
        return Strip{valid > 0 ? x + (at.view * shape.rows + row) * dim : x, valid, dim - feature};
      },
      dim, plan.tensors.grad_columns + (tile.view * shape.columns + first) * dim + feature,
      least(kLeftRows, shape.columns - first), dim - feature, plan.first_rows);
}

template <Dtype kType>
__global__ void __launch_bounds__(kThreads, 1) gradient_kernel_sm90(const InfoncePlan plan) {
  if constexpr (kSm90) {
    gradient<kType>(plan);
  } else {
    refuse();
  }
}

template <Dtype kType>
__global__ void __launch_bounds__(kThreads, 1) row_product_kernel_sm90(const InfoncePlan plan) {
  if constexpr (kSm90) {
    row_product<kType>(plan);
  } else {
    refuse();
  }
}

template <Dtype kType>
__global__ void __launch_bounds__(kThreads, 1) column_product_kernel_sm90(const InfoncePlan plan) {
  if constexpr (kSm90) {
    column_product<kType>(plan);
  } else {
    refuse();
  }
}

template <Dtype kType>
int32_t run_chunk(const InfoncePlan& plan, void* stream) {
  const int64_t tiles = static_cast<int64_t>(plan.row_tiles) * plan.column_tiles;
  int32_t status = launch(gradient_kernel_sm90<kType>, tiles, kThreads, kSharedBytes, stream, plan);
  if (status == COSMOS_OK)
    status = launch(row_product_kernel_sm90<kType>, static_cast<int64_t>(plan.row_tiles) * plan.dim_tiles, kThreads,
                    kSharedBytes, stream, plan);
  if (status == COSMOS_OK && plan.tensors.grad_columns != nullptr)
    status = launch(column_product_kernel_sm90<kType>,
                    static_cast<int64_t>(plan.column_tiles) * (kRightRows / kLeftRows) * plan.dim_tiles, kThreads,
                    kSharedBytes, stream, plan);
  return status;
}

}  // namespace

int32_t run_chunk_sm90(const InfoncePlan& plan, Dtype dtype, void* stream) {
  return dtype == Dtype::kHalf ? run_chunk<Dtype::kHalf>(plan, stream) : run_chunk<Dtype::kBfloat16>(plan, stream);
}

}  // namespace cosmos
