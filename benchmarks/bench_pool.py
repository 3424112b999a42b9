"""Cross-attention pooling, forward and backward: absorbed keys and values against keys and values per view.

Two baselines: the original's way (tokens repeated once per view, projected each time), and keys and values formed once
a sample. Axes: B batch, V views, L tokens, D embedding, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows, sweeps
from benchmarks.eager_cosmos import CrossAttentionPool as EagerPool
from benchmarks.harness import MIN_REPEATS, assert_agree, interleave
from benchmarks.rows import Row
from benchmarks.shapes import GLOBAL_VIEWS, LOCAL_VIEWS
from cosmos_fast.model.cross_pool import CrossAttentionPool

VIEWS = GLOBAL_VIEWS + LOCAL_VIEWS
HEADS = 8
Pool = TypeVar("Pool", EagerPool, CrossAttentionPool)
REPEATED_BAR, SHARED_BAR = 0.08, 0.6


class Inputs(NamedTuple):
    """Tokens [B, L, D] and queries [B, V, D], both with gradients."""

    tokens: Tensor
    queries: Tensor


def make_inputs(batch: int, length: int, dim: int, device: str, seed: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, length, dim), (batch, VIEWS, dim)
    tokens, queries = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)
    return Inputs(tokens, queries)


def make_pools(dim: int, device: str) -> tuple[EagerPool, CrossAttentionPool]:
    """The same weights for both, biases and LayerNorm included."""
    torch.manual_seed(0)
    eager, product = EagerPool(dim, HEADS), CrossAttentionPool(dim, HEADS)
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    product.load_state_dict(eager.state_dict())
    return eager.to(device), product.to(device)


def pool_repeated(pool: EagerPool, inputs: Inputs) -> Tensor:
    views_first_VBD = inputs.queries.transpose(0, 1).flatten(0, 1)
    pooled_VBD = pool(views_first_VBD, inputs.tokens)
    crossmodal_VBD = F.normalize(views_first_VBD + pooled_VBD, dim=-1)
    return crossmodal_VBD.unflatten(0, (VIEWS, -1)).transpose(0, 1)


def pool_shared(pool: EagerPool, inputs: Inputs) -> Tensor:
    keys = pool.ln_k(inputs.tokens)
    pooled = pool.attn(pool.ln_q(inputs.queries), keys, keys, need_weights=False)[0]
    return F.normalize(inputs.queries + pooled, dim=-1)


def pool_absorbed(pool: CrossAttentionPool, inputs: Inputs) -> Tensor:
    return pool(inputs.tokens, inputs.queries)


def forward_backward(call: partial[Tensor], inputs: Inputs) -> Tensor:
    """The gradient of the output is random but fixed, so that no channel's gradient vanishes."""
    output = call(inputs)
    output.backward(torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output))
    return output.detach()


def check(batch: int, length: int, dim: int, device: str) -> None:
    """Output and gradients of inputs and weights against the original's way in fp64."""
    eager, product = make_pools(dim, device)
    ours = outcome(product, pool_absorbed, make_inputs(batch, length, dim, device, 0, torch.float32))
    truth = outcome(eager.double(), pool_repeated, make_inputs(batch, length, dim, device, 0, torch.float64))
    assert_agree(ours, truth, rtol=1e-4)


def outcome(pool: Pool, call: Callable[[Pool, Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    output = forward_backward(partial(call, pool), inputs)
    leaves = {"tokens": inputs.tokens, "queries": inputs.queries, **dict(pool.named_parameters())}
    return {"output": output, **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def measure(batch: int, length: int, dim: int, device: str, repeats: int) -> list[Row]:
    eager, product = make_pools(dim, device)
    candidate = partial(forward_backward, partial(pool_absorbed, product))
    shapes: dict[str, object] = {"batch": batch, "views": VIEWS, "tokens": length, "embed_dim": dim, "heads": HEADS}
    found = []
    baselines = (
        ("keys and values repeated per view", pool_repeated, REPEATED_BAR),
        ("keys and values once a sample", pool_shared, SHARED_BAR),
    )
    for name, call, bar in baselines:
        timing = interleave(
            partial(forward_backward, partial(call, eager)),
            candidate,
            lambda seed: make_inputs(batch, length, dim, device, seed, torch.float32),
            check=partial(check, batch, length, dim, device),
            device=device,
            repeats=repeats,
        )
        found.append(
            Row(
                name="pool",
                device=rows.device_name(device),
                shapes=shapes,
                metric=f"forward_backward_ms/{length}",
                value=timing.candidate_median_ms,
                unit="ms",
                baseline=name,
                ratio=timing.ratio,
                bar=bar,
            )
        )
    return found


@click.command(name="pool", help=__doc__, context_settings={"show_default": True})
@click.option("--batch", type=click.IntRange(1), default=32, help="Samples.")
@click.option("--length", "lengths", type=click.IntRange(1), multiple=True, default=(77, 196), help="Tokens a sample.")
@click.option("--dim", type=click.IntRange(8), default=512, help="Channels; a multiple of 8.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(batch: int, lengths: tuple[int, ...], dim: int, device: str, repeats: int, out: Path | None) -> None:
    found = [row for length in lengths for row in measure(batch, length, dim, device, repeats)]
    rows.show(found)
    click.echo(f"wrote {rows.write(found, out)}")


sweeps.offer(command, "pool")

if __name__ == "__main__":
    command()
