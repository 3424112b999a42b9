"""The CUDA kernels of the pooling on a GPU, behind the public operation, against fp64 truth.

Without a GPU the same sources are tested in the emulation (`test_pool_emulated.py`).
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cosmos_fast.ops import PoolWeights, backends, cross_attention_pool
from cosmos_kernels import reference
from tests.kernels.truth import assert_no_worse, outcome

STATUS = {row["backend"]: row["status"] for row in backends.table() if row["op"] == "cross_attention_pool"}["cuda"]
ON_GPU = torch.cuda.is_available() and STATUS == "available"
pytestmark = pytest.mark.skipif(not ON_GPU, reason=f"the CUDA backend needs a GPU: {STATUS}")


def draw(dim, batch, views, length, dtype):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape, around=0.0, width=1.0):
        return (around + width * torch.randn(*shape, generator=generator)).to("cuda", dtype)

    return {
        "tokens_BLD": normal(batch, length, dim),
        "queries_BVD": normal(batch, views, dim),
        **{f"ln_{name}_weight": normal(dim, around=1.0, width=0.1) for name in "qk"},
        **{f"ln_{name}_bias": normal(dim, width=0.1) for name in "qk"},
        "in_proj_weight": normal(3 * dim, dim, width=1.5 * dim**-0.5),
        "in_proj_bias": normal(3 * dim, width=0.1),
        "out_proj_weight": normal(dim, dim, width=dim**-0.5),
        "out_proj_bias": normal(dim, width=0.1),
    }


def pool(tokens_BLD, queries_BVD, *, heads, **parameters):
    return cross_attention_pool(tokens_BLD, queries_BVD, PoolWeights(**parameters, heads=heads), backend="cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "views", "length", "dim", "heads"),
    [(2, 8, 77, 512, 8), (3, 8, 196, 512, 8), (1, 1, 1, 64, 2), (7, 5, 12, 128, 4), (5, 3, 130, 256, 4)],
)
def test_output_and_gradients(batch, views, length, dim, heads, dtype):
    inputs = draw(dim, batch, views, length, dtype)
    try:
        found = outcome(partial(pool, heads=heads), inputs)
    except ValueError as error:
        pytest.skip(str(error))
    oracle = partial(reference.cross_attention_pool, heads=heads)
    assert_no_worse(found, outcome(oracle, inputs), outcome(oracle, inputs, torch.float64))
