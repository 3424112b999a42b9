"""The Triton kernels of the residual LayerNorm against fp64 truth; interpreted where there is no GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from cosmos_fast.ops.layer_norm import add_layer_norm
from cosmos_kernels import layer_norm_triton, triton_support
from tests.kernels.layer_norm_cases import MIXES, check, draw
from tests.kernels.truth import outcome

MIX_NAMES = ["fp32", "bf16", "fp16-fp32", "fp32-bf16-fp32"]


@pytest.mark.parametrize("mix", MIXES, ids=MIX_NAMES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (7, 768), (33, 100), (3, 2000)])
def test_outputs_and_gradients(rows, dim, mix, device):
    check(draw(rows, dim, mix, device), "triton")


def test_more_rows_than_programs(device, monkeypatch):
    """A program of the backward pass takes every P-th row; the last ones are not all taken as often."""
    monkeypatch.setattr(layer_norm_triton, "_processors", lambda _: 1)
    monkeypatch.setattr(layer_norm_triton, "PROGRAMS_PER_PROCESSOR", 3)
    check(draw(20, 96, MIXES[3], device), "triton")


@pytest.mark.parametrize("gradients_of", [(0,), (1,)], ids=["sum only", "norm only"])
@pytest.mark.parametrize("mix", [MIXES[0], MIXES[3]], ids=["one dtype", "two"])
def test_an_output_that_nothing_reads(gradients_of, mix, device):
    found = check(draw(5, 64, mix, device), "triton", gradients_of)
    assert ("weight_D" in found.gradients) == (gradients_of == (1,))


def test_a_mean_far_from_zero_cancels(device):
    inputs = draw(5, 96, MIXES[0], device)
    inputs["x_TD"] += 1000
    check(inputs, "triton")


def test_equal_channels_give_the_bias(device):
    inputs = {**draw(4, 64, MIXES[0], device), "update_TD": torch.zeros(4, 64, device=device)}
    inputs["x_TD"] = torch.full_like(inputs["x_TD"], 3.0)
    found = check(inputs, "triton")
    assert torch.equal(found.outputs["output 1"], inputs["bias_D"].expand(4, -1))


def test_nan_stays_in_its_row(device):
    inputs = draw(6, 64, MIXES[0], device)
    inputs["update_TD"][2, 5] = float("nan")
    found = outcome(partial(add_layer_norm, backend="triton"), inputs)
    wanted = [row == 2 for row in range(6)]
    assert found.outputs["output 1"].isnan().all(1).tolist() == wanted
    assert found.gradients["x_TD"].isnan().any(1).tolist() == wanted
    assert found.gradients["weight_D"].isnan().all()


def test_strided_rows_and_no_rows(device):
    inputs = draw(6, 64, MIXES[0], device)
    expected = outcome(partial(add_layer_norm, backend="triton"), inputs)
    for strided in (inputs["x_TD"].repeat(1, 2)[:, :64], inputs["x_TD"].T.contiguous().T):
        found = outcome(partial(add_layer_norm, backend="triton"), {**inputs, "x_TD": strided})
        assert all(torch.equal(found.outputs[name], expected.outputs[name]) for name in expected.outputs)
        assert torch.equal(found.gradients["update_TD"], expected.gradients["update_TD"])
    empty = outcome(
        partial(add_layer_norm, backend="triton"),
        {**inputs, "x_TD": inputs["x_TD"][:0], "update_TD": inputs["x_TD"][:0]},
    )
    assert empty.gradients["weight_D"].eq(0).all()


def test_the_normalised_rows_take_the_dtype_of_autocast(device):
    inputs = draw(4, 64, MIXES[3], device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, normed = add_layer_norm(**inputs, backend="triton")
    assert (y.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    _, unrounded = add_layer_norm(**inputs, backend="triton")
    assert torch.equal(normed, unrounded.bfloat16())


def test_custom_ops_keep_their_contracts_and_compile(device):
    inputs = draw(4, 64, MIXES[3], device)
    arguments = [tensor.requires_grad_() for tensor in inputs.values()]
    operation = torch.ops.cosmos_fast.add_layer_norm.default
    torch.library.opcheck(operation, (*arguments, 1e-5, torch.bfloat16, "triton"))
    compiled = torch.compile(partial(add_layer_norm, backend="triton"), fullgraph=True, backend="aot_eager")
    found, plain = outcome(compiled, inputs), outcome(partial(add_layer_norm, backend="triton"), inputs)
    assert torch.equal(found.outputs["output 1"], plain.outputs["output 1"])
    assert torch.equal(found.gradients["weight_D"], plain.gradients["weight_D"])


@pytest.mark.parametrize(
    ("dim", "dtype", "reason"),
    [
        (8193, torch.float32, "rows of 8193 channels, it takes at most 8192"),
        (64, torch.float64, "a tensor in torch.float64"),
    ],
)
def test_what_it_does_not_take_is_refused_with_the_reason(dim, dtype, reason, device):
    inputs = draw(2, dim, (dtype, dtype, dtype), device)
    with pytest.raises(ValueError, match=f"'triton' was asked for but cannot run: {reason}"):
        add_layer_norm(**inputs, backend="triton")


def test_interpreted_kernels_and_those_not_measured_are_not_chosen_by_themselves(device):
    inputs = draw(2, 64, MIXES[0], device)
    y, normed = add_layer_norm(**inputs)
    assert torch.equal(y, inputs["x_TD"] + inputs["update_TD"])
    if triton_support.INTERPRETED:
        assert torch.equal(normed, torch.nn.functional.layer_norm(y, (64,), inputs["weight_D"], inputs["bias_D"]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: rows of a whole batch")
@pytest.mark.parametrize("mix", MIXES, ids=MIX_NAMES)
def test_a_batch_on_a_gpu(mix, device):
    """More rows than programs, and the same bits twice."""
    found, again = (check(draw(20_001, 768, mix, device), "triton") for _ in "12")
    assert all(torch.equal(found.gradients[name], again.gradients[name]) for name in found.gradients)
