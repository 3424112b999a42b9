/* CUDA library: backward of the multi-view contrastive loss, the host's side: arguments, chunks, choice of kernels.
 *
 * Two launches a chunk: one writes g, one multiplies it by the columns and, where wanted, its transpose by the rows.
 * Three matrix products in all, or two: what the loss needs at least.
 */
#include "infonce_backward.h"
#include "launch.h"

namespace cosmos {
namespace {

constexpr int64_t kMostBytes = INT64_C(1) << 25; /* stays in the L2 cache of an A100 (40 MB) or H100, H200 (50 MB) */

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

bool valid(const CosmosInfonceShape* s) {
  return s != nullptr && s->row_views > 0 && s->rows > 0 && s->column_views > 0 && s->columns > 0 && s->dim > 0 &&
         s->dim % 8 == 0 && s->dim <= (1 << 20) && s->offset >= 0 && s->offset + s->rows <= s->columns &&
         s->row_views * s->rows < (INT64_C(1) << 30) && s->column_views * s->columns < (INT64_C(1) << 30);
}

int64_t tile_bytes(const InfonceTiles& tiles) { return static_cast<int64_t>(tiles.row) * tiles.column * 2; }
int64_t all_row_tiles(const CosmosInfonceShape& s, const InfonceTiles& tiles) {
  return s.row_views * ceil_div(s.rows, tiles.row);
}
int64_t all_column_tiles(const CosmosInfonceShape& s, const InfonceTiles& tiles) {
  return s.column_views * ceil_div(s.columns, tiles.column);
}

/* Row tiles of a chunk: as many as let the blocks of the second launch fill the device once. */
int64_t chunk_row_tiles(const InfoncePlan& plan, const InfonceTiles& tiles, int multiprocessors, int64_t room) {
  const int64_t blocks = static_cast<int64_t>(multiprocessors) * tiles.blocks;
  const int64_t wanted = blocks / plan.dim_tiles / (plan.tensors.grad_columns != nullptr ? 2 : 1);
  const int64_t all = all_row_tiles(plan.shape, tiles);
  const int64_t chunk = smaller(smaller(wanted < 1 ? 1 : wanted, room), all);
  return ceil_div(all, ceil_div(all, chunk)); /* chunks of equal size */
}

/* Chunk after chunk, in an order that does not depend on the device's timing. room: tiles that fit in the workspace. */
template <typename RunChunk>
int32_t run(InfoncePlan plan, const InfonceTiles& tiles, int64_t room, int multiprocessors, const RunChunk& run_chunk) {
  plan.row_tiles_a_view = static_cast<int>(ceil_div(plan.shape.rows, tiles.row));
  plan.column_tiles_a_view = static_cast<int>(ceil_div(plan.shape.columns, tiles.column));
  plan.dim_tiles = static_cast<int>(ceil_div(plan.shape.dim, tiles.features));
  const int64_t rows = all_row_tiles(plan.shape, tiles), columns = all_column_tiles(plan.shape, tiles);
  const int64_t row_chunk = chunk_row_tiles(plan, tiles, multiprocessors, room);
  const int64_t column_chunk = ceil_div(columns, ceil_div(columns, smaller(room / row_chunk, columns)));
  for (int64_t row = 0; row < rows; row += row_chunk) {
    for (int64_t column = 0; column < columns; column += column_chunk) {
      plan.first_row_tile = static_cast<int>(row);
      plan.row_tiles = static_cast<int>(smaller(row_chunk, rows - row));
      plan.first_column_tile = static_cast<int>(column);
      plan.column_tiles = static_cast<int>(smaller(column_chunk, columns - column));
      plan.first_columns = column == 0;
      plan.first_rows = row == 0;
      const int32_t status = run_chunk(plan);
      if (status != COSMOS_OK) return status;
    }
  }
  return COSMOS_OK;
}

}  // namespace
}  // namespace cosmos

/* Bytes of workspace with which the call below runs best; it runs with anything from 64 KiB on. */
COSMOS_EXPORT int64_t cosmos_infonce_backward_workspace(const CosmosInfonceShape* shape) {
  using namespace cosmos;
  if (!valid(shape)) return COSMOS_BAD_ARGUMENT;
  const int64_t all = all_row_tiles(*shape, kTilesSm90) * all_column_tiles(*shape, kTilesSm90);
  return smaller(all * tile_bytes(kTilesSm90), kMostBytes);
}

/* dtype: 0 for fp16, 1 for bf16 features. path: 0 for mma.sync (compute capability 8.0 and later), 1 for wgmma (9.0
 * alone). workspace: device memory, aligned to 16 bytes. Asynchronous on `stream`, on the current device. Returns
 * COSMOS_OK, COSMOS_BAD_ARGUMENT, COSMOS_NO_PATH or a cudaError_t. */
COSMOS_EXPORT int32_t cosmos_infonce_backward(const CosmosInfonceShape* shape, const CosmosInfonceTensors* tensors,
                                              int32_t dtype, int32_t path, void* workspace, int64_t workspace_bytes,
                                              void* stream) {
  using namespace cosmos;
  const InfonceTiles& tiles = path == 1 ? kTilesSm90 : kTilesSm80;
  const int64_t room = workspace_bytes / tile_bytes(tiles);
  if (!valid(shape) || tensors == nullptr || workspace == nullptr || room < 1 || dtype < 0 || dtype > 1 || path < 0 ||
      path > 1)
    return COSMOS_BAD_ARGUMENT;
  DeviceFigures device;
  const int32_t status = device_figures(&device);
  if (status != COSMOS_OK) return status;
  InfoncePlan plan{};
  plan.shape = *shape;
  plan.tensors = *tensors;
  plan.gradient = static_cast<uint16_t*>(workspace);
  const Dtype type = static_cast<Dtype>(dtype);
  if (path == 0)
    return run(plan, tiles, room, device.multiprocessors,
               [=](const InfoncePlan& chunk) { return run_chunk_sm80(chunk, type, stream); });
  if (device.major != 9) return COSMOS_NO_PATH;
  return run(plan, tiles, room, device.multiprocessors,
             [=](const InfoncePlan& chunk) { return run_chunk_sm90(chunk, type, stream); });
}
