/* Backward of the multi-view contrastive loss: C interface, and the plan that its kernels share.
 *
 * Rows x [row_views, rows, dim] against columns y [column_views, columns, dim], s = scale <x, y>:
 *
 *     g        = exp(s - row_lse) + exp(s - col_lse) - 2 [column = offset + row]
 *     grad_x_i = sum over column views and columns j of g_ij y_j
 *     grad_y_j = sum over row views and rows i of g_ij x_i
 *
 * g is computed for a chunk of rows and columns at a time, into a workspace that fits in the L2 cache, and read from
 * there by both products; chunks follow each other on the stream and add up in a fixed order: deterministic.
 */
#ifndef COSMOS_INFONCE_BACKWARD_H
#define COSMOS_INFONCE_BACKWARD_H

#include "device.h"

struct CosmosInfonceShape {
  int64_t row_views, rows, column_views, columns;
  int64_t dim;    /* a multiple of 8: pad with zeros */
  int64_t offset; /* the column that belongs to row 0 */
};

/* Device pointers; features and gradients contiguous and aligned to 16 bytes. */
struct CosmosInfonceTensors {
  const void* rows;    /* [row_views, rows, dim] of the call's 16-bit type */
  const void* columns; /* [column_views, columns, dim] */
  const float* scale;  /* one number */
  const float* row_lse; /* [row_views, rows, column_views], natural logarithm */
  const float* col_lse; /* [row_views, column_views, columns] */
  float* grad_rows;     /* [row_views, rows, dim], overwritten */
  float* grad_columns;  /* [column_views, columns, dim], overwritten; null: not wanted */
};

namespace cosmos {

/* Rows and columns are cut into tiles of row_tile and column_tile, view by view: no tile spans two views. A chunk is a
 * rectangle of tiles; g of a chunk is a matrix [row tiles * row_tile, column tiles * column_tile], zero at ragged ends. */
struct InfoncePlan {
  CosmosInfonceShape shape;
  CosmosInfonceTensors tensors;
  uint16_t* gradient;                   /* workspace */
  int row_tiles_a_view, column_tiles_a_view;
  int first_row_tile, row_tiles, first_column_tile, column_tiles; /* of this chunk */
  int dim_tiles;
  bool first_columns, first_rows;       /* chunk is the first to add to its grad_rows, grad_columns */
};

struct ViewTile {
  int view, first; /* row or column within the view */
};

COSMOS_INLINE ViewTile view_tile(int tile, int tiles_a_view, int size) {
  return {tile / tiles_a_view, tile % tiles_a_view * size};
}

/* How the kernels of one architecture cut their work; see run_chunk_*. */
struct InfonceTiles {
  int row, column;      /* of the gradient of the logits */
  int column_rows;      /* columns that a block of grad_columns covers */
  int features;         /* features that a block of either gradient covers */
  int blocks;           /* that run on a multiprocessor at once */
};
constexpr InfonceTiles kTilesSm80{128, 128, 128, 128, 2};
constexpr InfonceTiles kTilesSm90{128, 256, 128, 256, 1};

/* Both launches of one chunk; return a status. */
int32_t run_chunk_sm80(const InfoncePlan& plan, Dtype dtype, void* stream);
int32_t run_chunk_sm90(const InfoncePlan& plan, Dtype dtype, void* stream);

COSMOS_INLINE int least(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

}  // namespace cosmos

#endif /* COSMOS_INFONCE_BACKWARD_H */
