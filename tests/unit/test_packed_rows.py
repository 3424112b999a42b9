"""fp32 rows in 24 bits an entry."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cosmos_fast.ops.packed_rows import pack_rows, unpack_rows


@pytest.mark.parametrize("shape", [(4, 6, 512), (1, 5), (3, 1), (2, 3, 7)])
def test_an_entry_is_off_by_no_more_than_the_row_allows(shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = rows.transpose(0, 1) if len(shape) == 3 else rows  # any strides
    packed = pack_rows(rows)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*rows.shape[:-1], 3 * rows.shape[-1] + 4)
    found = unpack_rows(packed)
    assert found.dtype == torch.float32
    largest = rows.abs().amax(dim=-1, keepdim=True)
    assert float(((found - rows).abs() / largest).max()) < 2**-23
    torch.testing.assert_close(found.abs().amax(dim=-1, keepdim=True), largest, rtol=2e-7, atol=0.0)
    assert torch.equal(unpack_rows(pack_rows(found)), found)  # what has travelled once travels unchanged


def test_products_of_features_lose_nothing_that_fp32_keeps() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (F.normalize(torch.randn(64, 512, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    exact, plain = x @ y.T, (x.float() @ y.float().T).double()
    packed = (x.float() @ unpack_rows(pack_rows(y.float())).T).double()
    assert float((packed - exact).abs().max()) < 2**-24 * 4
    assert float((plain - exact).abs().max()) > 2**-26


@pytest.mark.parametrize("scale", [1e-36, 1.0, 3e38])
def test_rows_of_any_size_travel(scale: float) -> None:
    rows = scale * torch.tensor([[-1.0, 1.0, 0.5, -0.25, 0.0], [1e-3, 0.0, -1e-3, 1e-4, 0.0]])
    torch.testing.assert_close(unpack_rows(pack_rows(rows)), rows, rtol=2e-6, atol=0.0)


def test_rows_of_zeros_stay_and_rows_with_nan_or_inf_become_nan() -> None:
    rows = torch.ones(4, 6)
    rows[0], rows[1, 2], rows[2, 3] = 0.0, math.nan, -math.inf
    found = unpack_rows(pack_rows(rows))
    assert torch.equal(found[0], rows[0])
    assert bool(found[1].isnan().all())
    assert bool(found[2].isnan().all())
    assert torch.equal(found[3], rows[3])
