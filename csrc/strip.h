/* What one step along k reads of an operand of a matrix product.
 *
 * An operand lies in memory either with k contiguous ("along k") or with its other axis contiguous ("across k"); both
 * are read without a transposition in memory. A strip is rows of contiguous elements, of which the first `rows` and, in
 * each, the first `width` exist; the rest of the tile counts as zero.
 */
#ifndef COSMOS_STRIP_H
#define COSMOS_STRIP_H

#include "device.h"

namespace cosmos {

struct Strip {
  const uint16_t* origin; /* aligned to 16 bytes, as is every row */
  int rows, width;        /* width: a multiple of 8; zero or less: nothing is read */
};

enum class Layout { kAlongK, kAcrossK };

}  // namespace cosmos

#endif /* COSMOS_STRIP_H */
