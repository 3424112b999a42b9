"""Residual addition and LayerNorm as one operation, by PyTorch."""

from __future__ import annotations

import pytest
import torch

from cosmos_fast.ops.layer_norm import add_layer_norm
from tests.kernels.layer_norm_cases import MIXES, check, draw


@pytest.mark.parametrize("mix", [*MIXES, (torch.float64,) * 3], ids=str)
def test_outputs_and_gradients(mix):
    check(draw(9, 40, mix, "cpu"), "eager")


@pytest.mark.parametrize("gradients_of", [(0,), (1,)])
def test_an_output_that_nothing_reads(gradients_of):
    check(draw(9, 40, MIXES[3], "cpu"), "eager", gradients_of)


def test_shapes_that_do_not_fit_are_named():
    inputs = draw(4, 16, MIXES[0], "cpu")
    with pytest.raises(ValueError, match=r"x_TD and update_TD have shapes \(4, 16\) and \(3, 16\)"):
        add_layer_norm(**{**inputs, "update_TD": inputs["update_TD"][:3]})
    with pytest.raises(ValueError, match=r"bias_D has shape \(15,\), expected \(16,\)"):
        add_layer_norm(**{**inputs, "bias_D": inputs["bias_D"][:15]})


def test_devices_and_types_that_do_not_fit_are_named():
    inputs = draw(4, 16, MIXES[0], "cpu")
    with pytest.raises(ValueError, match=r"weight_D is torch.float32 on meta, expected a floating-point type on cpu"):
        add_layer_norm(**{**inputs, "weight_D": inputs["weight_D"].to("meta")})
    with pytest.raises(ValueError, match=r"update_TD is torch.int64 on cpu, expected a floating-point type on cpu"):
        add_layer_norm(**{**inputs, "update_TD": inputs["update_TD"].long()})


def test_the_contract_of_the_custom_op():
    arguments = [tensor.requires_grad_() for tensor in draw(4, 16, MIXES[0], "cpu").values()]
    operation = torch.ops.cosmos_fast.add_layer_norm.default
    torch.library.opcheck(operation, (*arguments, 1e-5, torch.float32, "eager"))
