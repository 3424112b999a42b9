"""What a rank of ZeRO gives to a checkpoint: the elements that lie with it, each on exactly one rank.

Axes: W ranks, S elements of a rank's part of one flat buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cosmos_fast.engine.zero_layout import FlatLayout
from cosmos_fast.model.stored import TensorSlice
from cosmos_fast.utils.errors import UserError

# How a state of the optimizer is called in a checkpoint. The masters are the student.
STORED_AS = {
    "master": "student",
    "teacher": "teacher",
    "exp_avg": "optimizer/exp_avg",
    "exp_avg_sq": "optimizer/exp_avg_sq",
}
StateOf = Callable[[Tensor, str], Tensor]
"""(master, one of STORED_AS) -> a tensor like the master."""


def slices_of_parts(
    parts: Sequence[tuple[Tensor, FlatLayout]], state_of: StateOf, rank: int, *, copy: bool
) -> dict[str, TensorSlice]:
    """Of flat buffers: all that this rank's parts hold. On the CPU; copy: nothing shares memory with the run."""
    found = {}
    for master_S, layout in parts:
        shapes = dict(zip(layout.names, layout.shapes, strict=True))
        for state, prefix in STORED_AS.items():
            values_S = _on_host(state_of(master_S, state), copy)
            for one in layout.slices(rank, len(master_S)):
                values = values_S[one.place : one.place + one.count]
                found[f"{prefix}/{one.name}"] = TensorSlice(values, one.start, shapes[one.name])
    return found


def slices_of_whole(
    named: Mapping[str, Tensor], state_of: StateOf, rank: int, world_size: int, *, copy: bool
) -> dict[str, TensorSlice]:
    """Of parameters that every rank has whole: its share of their elements."""
    layout = FlatLayout.of(list(named), [tuple(tensor.shape) for tensor in named.values()], None)
    share = -(-sum(tensor.numel() for tensor in named.values()) // world_size)
    found = {}
    for one in layout.slices(rank, share):
        for state, prefix in STORED_AS.items():
            whole = state_of(named[one.name], state)
            values = _on_host(whole.reshape(-1)[one.start : one.start + one.count], copy)
            found[f"{prefix}/{one.name}"] = TensorSlice(values, one.start, tuple(whole.shape))
    return found


def step_slices(names: Sequence[str], steps: int) -> dict[str, TensorSlice]:
    """Steps that each parameter has taken, which one rank stores."""
    return {f"optimizer/step/{name}": TensorSlice(torch.tensor([steps]), 0, ()) for name in names}


def whole_tensors(slices: Mapping[str, TensorSlice], what: str) -> dict[str, Tensor]:
    """The tensors named "<what>/<name>" of slices that are whole, as they are on a single rank."""
    prefix = f"{what}/"
    chosen = {key.removeprefix(prefix): piece for key, piece in slices.items() if key.startswith(prefix)}
    assert all(len(piece.values) == math.prod(piece.shape) for piece in chosen.values())
    return {name: piece.values.view(piece.shape) for name, piece in chosen.items()}


def common_steps(stored: Mapping[str, Tensor], names: Sequence[str]) -> int:
    """UserError where the parameters of a checkpoint have not all taken the same number of steps."""
    steps = {int(stored[f"step/{name}"]) for name in names}
    if len(steps) != 1:
        raise UserError(
            f"the checkpoint's parameters have taken {min(steps)} to {max(steps)} steps, which DeepSpeed's flat "
            "buffers cannot tell apart: continue it with run.engine=plain"
        )
    return steps.pop()


def _on_host(tensor: Tensor, copy: bool) -> Tensor:
    return tensor.detach().to("cpu", copy=copy).contiguous()
