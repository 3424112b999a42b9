"""What the stages of the losses and the pooling cost: multiply-adds, exponentials, and the largest tensor they make.

Counted, not timed. The stages are called by themselves: inside an operation of torch nothing that it does is seen.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_fast.ops import (
    backends,
    cross_pool_products,
    cross_pool_tiled,
    distill_tiled,
    distillation_cross_entropy,
    infonce_tiled,
    multiview_infonce,
)

BATCH, TOTAL, DIM, TILE = 96, 104, 16, 1 << 12
PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "addmm_": (1, 2), "baddbmm_": (1, 2)}


class Work(TorchDispatchMode):
    """multiply_adds of all products; exps: exponentials of tensors, softmaxes counted as one each; largest: elements of
    the largest tensor that any operation gave, views of what is there included."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds, self.exps, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name in PRODUCTS:
            left, right = (args[i] for i in PRODUCTS[name])
            self.multiply_adds += left.numel() * right.shape[-1]
        elif name in ("exp", "exp_", "logsumexp", "_softmax", "_log_softmax"):
            self.exps += args[0].numel()
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        return out


def unit(views: int, batch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(views, batch, DIM, generator=generator), dim=-1)


@pytest.mark.parametrize(("scale", "exps"), [(14.3, 1), (45.0, 1), (3000.0, 2)])
def test_infonce_makes_one_product_for_both_directions_and_one_exponential_where_the_range_allows(
    scale: float, exps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward one product of all pairs, backward two, or three with the columns' gradient; a tile at a time."""
    monkeypatch.setattr(infonce_tiled, "TILE_ELEMENTS", TILE)
    rows, columns = unit(3, BATCH, 0), unit(2, TOTAL, 1)
    logits = 3 * BATCH * 2 * TOTAL
    assert max(rows.numel(), columns.numel()) > TILE // 2
    with Work() as forward:
        row_lse, col_lse, _ = infonce_tiled.log_sum_exps(rows, columns, torch.tensor(scale), 4)
    assert forward.multiply_adds == logits * DIM
    assert forward.exps == exps * logits
    assert forward.largest <= max(TILE, rows.numel())
    for want_columns, products in ((False, 2), (True, 3)):
        with Work() as backward:
            infonce_tiled.feature_gradients(rows, columns, torch.tensor(scale), row_lse, col_lse, 4, want_columns)
        assert backward.multiply_adds == products * logits * DIM
        assert exps * logits <= backward.exps <= (exps + 0.1) * logits  # and those of the log-sum-exps
        assert backward.largest <= max(TILE, rows.numel())


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...], bool]]:
    """Calls of InfoNCE's stages by a backend "watched": which, the shape of its rows, whether columns are wanted."""
    calls: list[tuple[str, tuple[int, ...], bool]] = []

    def forward(*given: Any) -> Any:
        calls.append(("forward", tuple(given[0].shape), False))
        return infonce_tiled.log_sum_exps(*given)

    def backward(*given: Any) -> Any:
        calls.append(("backward", tuple(given[0].shape), given[-1]))
        return infonce_tiled.feature_gradients(*given)

    stages = SimpleNamespace(log_sum_exps=forward, feature_gradients=backward)
    known = {op: list(found) for op, found in backends._BACKENDS.items()}
    monkeypatch.setattr(backends, "_BACKENDS", known)
    backends.register(backends.Backend("multiview_infonce", "watched", stages))
    return calls


@pytest.mark.parametrize(
    ("wanted", "rows", "columns_too"),
    [("a", 3, False), ("b", 2, False), ("scale", 3, False), ("a scale", 3, False), ("a b scale", 3, True)],
)
def test_infonce_goes_once_forward_and_once_back_whatever_needs_a_gradient(
    watched: list[tuple[str, tuple[int, ...], bool]], wanted: str, rows: int, columns_too: bool
) -> None:
    """The scale costs no pass of its own, a side without gradient becomes the columns, and no work is done for it."""
    inputs = {"a": unit(3, 5, 0), "b": unit(2, 5, 1), "scale": torch.tensor(9.0)}
    leaves = {name: x.requires_grad_(name in wanted.split()) for name, x in inputs.items()}
    multiview_infonce(*leaves.values(), backend="watched").backward()
    shape = (rows, 5, DIM)
    assert watched == [("forward", shape, False), ("backward", shape, columns_too)]


def test_infonce_keeps_its_inputs_and_two_log_sum_exps() -> None:
    a, b = unit(4, BATCH, 0).requires_grad_(), unit(2, BATCH, 1).requires_grad_()
    scale = torch.tensor(14.0, requires_grad=True)
    saved: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = multiview_infonce(a, b, scale)
    inputs = {x.untyped_storage().data_ptr() for x in (a, b, scale)}
    assert sum(x.numel() for pointer, x in saved.items() if pointer not in inputs) == 4 * 2 * (BATCH + BATCH)
    assert not [name for name, value in vars(loss.grad_fn).items() if isinstance(value, Tensor)]


@pytest.mark.parametrize(
    ("wanted", "sides"),
    [("a", (True, False)), ("b", (False, True)), ("scale", (True, False)), ("b scale", (False, True))],
)
def test_distillation_works_for_the_sides_that_want_a_gradient(
    wanted: str, sides: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale takes the gradient of a side that is there, else of the first."""
    asked: list[tuple[bool, bool]] = []

    def backward(*given: Any) -> Any:
        asked.append(given[-2:])
        return distill_tiled.feature_gradients(*given)

    stages = SimpleNamespace(statistics=distill_tiled.statistics, feature_gradients=backward)
    monkeypatch.setattr(backends, "_BACKENDS", {op: list(found) for op, found in backends._BACKENDS.items()})
    backends.register(backends.Backend("distillation_cross_entropy", "watched", stages))
    student = {"a": unit(3, 5, 0), "b": unit(2, 5, 1), "scale": torch.tensor(9.0)}
    a, b, scale = (x.requires_grad_(name in wanted.split()) for name, x in student.items())
    teacher = unit(3, 5, 2), unit(2, 5, 3)
    distillation_cross_entropy(a, b, *teacher, scale, torch.tensor(8.0), backend="watched").backward()
    assert asked == [sides]


@pytest.mark.parametrize(("scale", "exps"), [(14.3, 1), (3000.0, 2)])
def test_distillation_makes_each_logit_once_for_both_directions(
    scale: float, exps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Student's and teacher's of a tile at a time, and the gradient's products of the sides that want one."""
    monkeypatch.setattr(distill_tiled, "TILE_ELEMENTS", TILE)
    features = unit(2, BATCH, 0), unit(2, TOTAL, 1), unit(1, BATCH, 2), unit(2, TOTAL, 3)
    scales = torch.tensor(scale), torch.tensor(0.9 * scale)
    logits = 2 * BATCH * 2 * TOTAL
    with Work() as forward:
        states = distill_tiled.statistics(*features, *scales)
    assert forward.multiply_adds == 2 * logits * DIM
    assert exps * 2 * logits <= forward.exps <= (exps * 2 + 0.2) * logits  # and those that merge tiles
    assert forward.largest <= TILE
    for want_a, want_b in ((True, False), (False, True), (True, True)):
        with Work() as backward:
            distill_tiled.feature_gradients(*features, *scales, *states, 1.0, 0.5, want_a, want_b)
        assert backward.multiply_adds == (2 + want_a + want_b) * logits * DIM
        assert exps * 2 * logits <= backward.exps <= (exps * 2 + 0.2) * logits
        assert backward.largest <= TILE


def test_dense_distillation_works_on_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill_tiled, "TILE_ELEMENTS", TILE)
    student, teacher = torch.randn(64, 1000), torch.randn(64, 1000)
    with Work() as forward:
        states = distill_tiled.dense_statistics(student, teacher, 0.5, 0.1)
    assert forward.largest <= TILE
    assert forward.exps <= 2 * student.numel() + 64
    made: list[Tensor] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *given, **more: made.append(empty_like(*given, **more)) or made[-1])
    with Work() as backward:
        gradient = distill_tiled.dense_gradient(student, teacher, states, torch.tensor(1.0), 0.5, 0.1)
    assert len(made) == 1  # the gradient is the one tensor of that size
    assert made[0] is gradient
    assert backward.exps == 2 * student.numel()


def pool_parameters(dim: int) -> cross_pool_products.Parameters:
    shapes = [(dim,)] * 4 + [(3 * dim, dim), (3 * dim,), (dim, dim), (dim,)]
    generator = torch.Generator().manual_seed(0)
    return cross_pool_products.Parameters(*(torch.randn(shape, generator=generator) for shape in shapes))


def test_pooling_forms_no_keys_and_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply-adds are those of the absorbed form to the last one: keys and values would cost 2 B L D D more."""
    batch, views, length, heads = 12, 2, 20, 4
    monkeypatch.setitem(cross_pool_tiled.TILE_BYTES, "cpu", 4 * 3 * length * DIM)  # three samples at a time
    tokens, queries = torch.randn(batch, length, DIM), torch.randn(batch, views, DIM)
    parameters = pool_parameters(DIM)
    rows, folding = batch * views, 3 * DIM * DIM
    meeting = batch * views * heads * length * DIM  # one product of all queries with all tokens
    with Work() as forward:
        output, norms, lse = cross_pool_products.forward(tokens, queries, parameters, heads, cross_pool_tiled.attend)
    assert forward.multiply_adds == folding + 4 * rows * DIM * DIM + 2 * meeting
    assert forward.exps == batch * views * heads * length
    with Work() as backward:
        cross_pool_products.backward(
            torch.ones_like(output), output, norms, lse, tokens, queries, parameters, heads,
            cross_pool_tiled.attend_backward,
        )  # fmt: skip
    affine = folding + 3 * DIM * DIM  # of the LayerNorms: shift and weight
    again = folding + 2 * rows * DIM * DIM + rows * DIM * DIM  # folded and absorbed queries, values of every head
    assert backward.multiply_adds == again + affine + 8 * rows * DIM * DIM + 6 * meeting
    assert backward.exps == batch * views * heads * length
    largest = batch * views * heads * DIM  # what meets the tokens, of all samples
    assert max(forward.largest, backward.largest) <= max(largest, tokens.numel())


def test_pooling_holds_a_tile_of_normalised_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length = 12, 20
    tokens, queries = torch.randn(batch, length, DIM), torch.randn(batch, 8, DIM)
    seen: list[int] = []
    layer_norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *more, **named: seen.append(len(x)) or layer_norm(x, *more, **named))
    for samples in (1, 5, 99):
        seen.clear()
        monkeypatch.setitem(cross_pool_tiled.TILE_BYTES, "cpu", 4 * samples * length * DIM)
        cross_pool_tiled.attend(tokens, queries)
        assert max(seen) == min(samples, batch)
        assert len(seen) == math.ceil(batch / samples)
