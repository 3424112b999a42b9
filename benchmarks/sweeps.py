"""Every operation over its sizes, forward and backward: what the plots of time against size show.

    python -m benchmarks.sweeps infonce --device cuda --budget-s 60

Axes: V views, B batch, L tokens, D embedding, H heads, M rows of logits, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import rows, tower_sweeps
from benchmarks.rows import Row
from benchmarks.sweep import ORACLE, Point, Sweep, draw, measure, with_gradients
from cosmos_fast.ops import (
    PoolWeights,
    adamw_ema_,
    cross_attention_pool,
    dense_distillation_cross_entropy,
    multiview_infonce,
)

COMPILED = "eager, compiled"
DIM, HEADS, VIEWS, TEACHER_VIEWS = 512, 8, 8, 4
ADAMW = {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.5, "ema_decay": 0.999}


def with_compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operation, which then takes COMPILED as a backend too: its oracle through torch.compile."""

    @functools.cache
    def compiled() -> Callable[..., Tensor]:
        return torch.compile(partial(function, backend=ORACLE))

    def call(*arguments: Any, backend: str) -> Tensor:
        return compiled()(*arguments) if backend == COMPILED else function(*arguments, backend=backend)

    return call


def infonce(device: str) -> Sweep:
    """The 64 pairs of cross-modal student views (with gradient) and teacher views (without)."""
    on_gpu = device == "cuda"

    def make_inputs(batch: int, seed: int) -> dict[str, Tensor]:
        student, teacher = (
            F.normalize(draw(views, batch, DIM, device=device, dtype=torch.float32, seed=2 * seed + i), dim=-1)
            for i, views in enumerate((2 * VIEWS, TEACHER_VIEWS))
        )
        scale = torch.tensor(14.3, device=device, requires_grad=True)
        return {"student": student.requires_grad_(), "scale": scale, "teacher": teacher}

    def run(backend: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        # On a GPU the matrix products take fp16: features of unit norm lose less in it than in bf16.
        operands = torch.float16 if on_gpu and backend != ORACLE else None
        leaves = {name: inputs[name] for name in ("student", "scale")}
        loss = multiview_infonce(
            inputs["student"], inputs["teacher"], inputs["scale"], operand_dtype=operands, backend=backend
        )
        return with_gradients(loss, leaves)

    def point(batch: int, bar: float | None) -> Point:
        pairs = 2 * VIEWS * TEACHER_VIEWS
        features = (2 * VIEWS + TEACHER_VIEWS) * batch * DIM
        return Point(
            size=batch,
            shapes={"batch": batch, "views": [2 * VIEWS, TEACHER_VIEWS], "embed_dim": DIM},
            elements=features,
            flops=3 * pairs * 2.0 * batch * batch * DIM,  # forward, and backward of the student's side: twice
            bytes=4.0 * (2 * features + 2 * VIEWS * batch * DIM),  # read in both directions; one gradient written
            make_inputs=partial(make_inputs, batch),
            run=run,
            rtol=1e-3 if on_gpu else 1e-4,
            bar=bar,
        )

    sizes = (
        ((1024, 0.1), (2048, None), (4096, 1 / 3), (8192, 1 / 3)) if on_gpu else ((64, None), (256, None), (512, 0.9))
    )
    return Sweep(
        name="infonce",
        op="multiview_infonce",
        size_label="samples in the batch",
        points=[point(*size) for size in sizes],
        matmul_dtype=torch.float16 if on_gpu else torch.float32,
    )


def pool(device: str) -> Sweep:
    """Both directions of pooling 77 tokens by 8 queries a sample; gradients of tokens, queries and weights."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    length = 77
    shapes = {"ln_q_weight": (DIM,), "ln_q_bias": (DIM,), "ln_k_weight": (DIM,), "ln_k_bias": (DIM,)}
    matrices = {"in_proj_weight": (3 * DIM, DIM), "in_proj_bias": (3 * DIM,)}
    operation = with_compiled(cross_attention_pool)
    matrices |= {"out_proj_weight": (DIM, DIM), "out_proj_bias": (DIM,)}

    def make_inputs(batch: int, seed: int) -> dict[str, Tensor]:
        made = {
            "tokens": draw(batch, length, DIM, device=device, dtype=dtype, seed=seed),
            "queries": draw(batch, VIEWS, DIM, device=device, dtype=dtype, seed=seed + 1000),
        }
        for i, (name, shape) in enumerate((shapes | matrices).items()):
            scale = DIM**-0.5 if name in matrices else 1.0
            made[name] = scale * draw(*shape, device=device, dtype=torch.float32, seed=i)
        return {name: tensor.requires_grad_() for name, tensor in made.items()}

    def run(backend: str, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = PoolWeights(**{name: leaves[name] for name in shapes | matrices}, heads=HEADS)
        pooled = operation(leaves["tokens"], leaves["queries"], weights, backend=backend)
        ramp = torch.linspace(-1, 1, pooled.numel(), device=device).view_as(pooled)
        # The key's bias cancels in the softmax: rounding alone makes its gradient, so it is not compared.
        found = with_gradients((pooled * ramp).sum(), leaves)
        return {name: tensor for name, tensor in found.items() if name not in ("in_proj_bias", "ln_k_bias")}

    def point(batch: int, bar: float | None) -> Point:
        products, scores = 4.0 * VIEWS * DIM * DIM, 1.0 * VIEWS * HEADS * length * DIM
        features = batch * (length + VIEWS) * DIM
        return Point(
            size=batch,
            shapes={"batch": batch, "views": VIEWS, "tokens": length, "embed_dim": DIM, "heads": HEADS},
            elements=features,
            flops=2 * batch * (3 * (products + 2 * scores) + scores),  # backward: twice, and the scores again
            bytes=4.0 * features * dtype.itemsize,  # tokens and queries read twice, output and gradients written
            make_inputs=partial(make_inputs, batch),
            run=run,
            rtol=2e-2 if device == "cuda" else 1e-3,
            bar=bar,
        )

    sizes = ((16, None), (64, None), (256, 1 / 15)) if device == "cuda" else ((2, None), (8, None), (32, 0.08))
    return Sweep(
        name="pool",
        op="cross_attention_pool",
        size_label=f"samples of {length} tokens, 8 queries each",
        points=[point(*size) for size in sizes],
        matmul_dtype=dtype,
        extra=(COMPILED,) if device == "cuda" else (),
    )


def distill(device: str) -> Sweep:
    """Soft-target cross-entropy over dense logits, loss and the student's gradient."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch = 2048 if device == "cuda" else 256
    operation = with_compiled(dense_distillation_cross_entropy)

    def make_inputs(classes: int, seed: int) -> dict[str, Tensor]:
        student, teacher = (draw(batch, classes, device=device, dtype=dtype, seed=2 * seed + i) for i in range(2))
        return {"student": student.requires_grad_(), "teacher": teacher}

    def run(backend: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = operation(inputs["student"], inputs["teacher"], 0.1, 0.05, backend=backend)
        return with_gradients(loss, {"student": inputs["student"]})

    def point(classes: int, bar: float | None) -> Point:
        return Point(
            size=classes,
            shapes={"rows": batch, "classes": classes},
            elements=2 * batch * classes,
            flops=20.0 * batch * classes,
            bytes=3.0 * batch * classes * dtype.itemsize,  # both read, one gradient written
            make_inputs=partial(make_inputs, classes),
            run=run,
            rtol=2e-2 if device == "cuda" else 1e-4,
            bar=bar,
        )

    sizes = (
        ((4096, None), (16384, None), (65536, 1 / 3))
        if device == "cuda"
        else ((1024, None), (4096, None), (16384, None))
    )
    return Sweep(
        name="distill",
        op="dense_distillation_cross_entropy",
        size_label=f"classes, {batch} rows",
        points=[point(*size) for size in sizes],
        extra=(COMPILED,) if device == "cuda" else (),
    )


def optimizer(device: str) -> Sweep:
    """AdamW, the teacher's average and clipping over matrices of 512 x 512."""

    def make_inputs(count: int, seed: int) -> list[list[Tensor]]:
        lists = [draw(count, 512, 512, device=device, dtype=torch.float32, seed=5 * seed + i) for i in range(5)]
        lists[3].square_()
        return [list(stack.unbind()) for stack in lists]

    def run(backend: str, inputs: list[list[Tensor]]) -> dict[str, Tensor]:
        adamw_ema_(*inputs, step=3, clip_norm=1.0, backend=backend, **ADAMW)
        return {"param": inputs[0][0], "ema": inputs[4][0]}

    def point(count: int, bar: float | None) -> Point:
        elements = count * 512 * 512
        return Point(
            size=elements,
            shapes={"parameters": elements, "tensors": count},
            elements=5 * elements,
            flops=20.0 * elements,
            bytes=40.0 * elements,  # the gradient once for its norm; then five read, four written
            make_inputs=partial(make_inputs, count),
            run=run,
            rtol=1e-5,
            bar=bar,
        )

    sizes = ((16, None), (128, None), (580, None)) if device == "cuda" else ((4, None), (32, None), (128, None))
    return Sweep(
        name="optimizer",
        op="adamw_ema",
        size_label="parameters",
        points=[point(*size) for size in sizes],
    )


SWEEPS: dict[str, Callable[[str], Sweep]] = {
    "infonce": infonce,
    "distill": distill,
    "pool": pool,
    "optimizer": optimizer,
    "attention": tower_sweeps.attention,
    "layer_norm": tower_sweeps.layer_norm,
}


def run(name: str, device: str, budget_s: float, folder: Path | None = None) -> list[Row]:
    """Measure one sweep, write its rows and pictures into `folder` (default: the device's results), show the rows.

    Rows are written after each size. Raises `sweep.Wrong` after all that where a backend broke or disagreed.
    """
    target = folder or rows.RESULTS / rows.slug(rows.device_name(device))
    path = target / f"{name}_sweep.json"
    found: list[Row] = []

    def keep(so_far: list[Row]) -> None:
        found[:] = so_far
        rows.write(found, path)

    try:
        measure(SWEEPS[name](device), device, budget_s=budget_s, keep=keep)
    finally:
        if found:
            rows.show(found)
            print(f"wrote {path}")
            _draw(found, target)
    return found


def _draw(found: list[Row], folder: Path) -> None:
    try:
        from benchmarks import plots  # here, so that rows need no matplotlib
    except ImportError as error:
        print(f"left out: pictures: {error}")
        return
    for path in plots.draw(found, folder):
        print(f"wrote {path}")


def offer(command: click.Command, name: str) -> None:
    """Give a benchmark's command the option --plot, which measures the sweep of that name instead."""
    compare = command.callback
    assert compare is not None

    def compare_or_sweep(plot: bool, **options: Any) -> None:
        if plot:
            run(name, options["device"], budget_s=300.0)
        else:
            compare(**options)

    command.callback = compare_or_sweep
    help_text = "Instead: every backend over several sizes; rows, time plot and roofline into the results folder."
    command.params.append(click.Option(["--plot"], is_flag=True, help=help_text))


@click.command(name="sweeps", help=__doc__)
@click.argument("name", type=click.Choice(list(SWEEPS)))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--budget-s", type=float, default=300.0, show_default=True, help="Seconds after which no size is begun.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Default: the device's results.")
def command(**arguments: Any) -> None:
    run(**arguments)


if __name__ == "__main__":
    command()
