"""What the tests of the residual LayerNorm share: inputs, and the check of every output and gradient."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cosmos_fast.ops.layer_norm import add_layer_norm
from cosmos_kernels import reference
from tests.kernels.truth import Outcome, assert_no_worse, outcome

# dtypes of the residual stream, of the branch's output, of the parameters
MIXES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32),
]


def draw(rows: int, dim: int, mix: tuple[torch.dtype, torch.dtype, torch.dtype], device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows + dim)
    stream, branch, parameter = mix

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "x_TD": 2 * normal(rows, dim, dtype=stream) + 1,
        "update_TD": normal(rows, dim, dtype=branch),
        "weight_D": 1 + 0.2 * normal(dim, dtype=parameter),
        "bias_D": normal(dim, dtype=parameter),
    }


def check(inputs: dict[str, Tensor], backend: str, gradients_of: tuple[int, ...] = (0, 1)) -> Outcome:
    """Against fp64, with gradients flowing into the outputs named (0: the sum, 1: its LayerNorm)."""

    def read(function, **leaves):
        outputs = function(**leaves)
        return tuple(output if i in gradients_of else output.detach() for i, output in enumerate(outputs))

    oracle = partial(read, reference.add_layer_norm)
    found = outcome(partial(read, partial(add_layer_norm, backend=backend)), inputs)
    assert all(gradient.dtype == inputs[name].dtype for name, gradient in found.gradients.items())
    # fp32's eager may be lucky to the last bit; sums over rows round in another order.
    assert_no_worse(found, outcome(oracle, inputs), outcome(oracle, inputs, torch.float64), extra_floor=1e-6)
    return found
