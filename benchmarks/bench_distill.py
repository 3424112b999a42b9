"""Soft-target distillation, forward and backward: between similarity matrices, and of dense logits.

Baselines: the oracle (every matrix stored), the oracle compiled, and for dense logits Liger's KL kernel where it is
installed (it wants log-probabilities, so its time includes the two softmaxes). Axes: V views, B batch, D embedding, M
rows and K classes of dense logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import parts, rows, sweeps
from benchmarks.harness import MIN_REPEATS, assert_agree, interleave
from benchmarks.memory import peak_mib
from benchmarks.rows import Row
from cosmos_fast.ops import dense_distillation_cross_entropy, distillation_cross_entropy

VIEWS, DIM = 2, 512
TEMPERATURES = 0.1, 0.05
EAGER_BAR, LIGER_BAR = 1 / 3, 1 / 1.3  # dense logits on a GPU
UNCOMPARED = {"baseline": None, "ratio": None, "bar": None}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One form at one size. `function(**inputs, backend=...)` returns the loss; `leaves` get gradients."""

    form: str
    shapes: dict[str, object]
    make_inputs: Callable[[int], Inputs]
    function: Callable[..., Tensor]
    leaves: tuple[str, ...]
    rtol: float
    others: dict[str, Callable[..., Tensor]]
    bars: dict[str, float]


@dataclass(frozen=True)
class Options:
    """backend of both operations; timed repetitions."""

    backend: str
    repeats: int


def make_features(batch: int, device: str, seed: int) -> Inputs:
    """Features [V, B, D] of unit norm; the teacher's are related to the student's."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, VIEWS, batch, DIM, generator=generator)
    teacher = drawn + 0.5 * torch.randn(drawn.shape, generator=generator)
    student_a, student_b = (F.normalize(x, dim=-1).to(device).requires_grad_() for x in drawn)
    teacher_a, teacher_b = (F.normalize(x, dim=-1).to(device) for x in teacher)
    return {
        "student_a": student_a,
        "student_b": student_b,
        "teacher_a": teacher_a,
        "teacher_b": teacher_b,
        "student_scale": torch.tensor(14.3, device=device, requires_grad=True),
        "teacher_scale": torch.tensor(20.0, device=device),
    }


def make_logits(shape: tuple[int, int], device: str, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    student, teacher = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    return {"student_logits_MK": student.requires_grad_(), "teacher_logits_MK": teacher}


def dense(student_logits_MK: Tensor, teacher_logits_MK: Tensor, backend: str) -> Tensor:
    return dense_distillation_cross_entropy(student_logits_MK, teacher_logits_MK, *TEMPERATURES, backend=backend)


def liger_kl(student_logits_MK: Tensor, teacher_logits_MK: Tensor) -> Tensor:
    """The same gradient; the loss is smaller by the teacher's entropy."""
    from liger_kernel.transformers import LigerKLDIVLoss

    log_student_MK = (student_logits_MK.float() / TEMPERATURES[0]).log_softmax(dim=1)
    teacher_MK = (teacher_logits_MK.float() / TEMPERATURES[1]).softmax(dim=1)
    return LigerKLDIVLoss(reduction="batchmean")(log_student_MK, teacher_MK)


def liger_is_here() -> bool:
    try:
        import liger_kernel.transformers  # noqa: F401
    except Exception as error:
        print(f"without Liger's KL kernel: {type(error).__name__}: {error}")
        return False
    return True


def similarity_case(batch: int, device: str) -> Case:
    return Case(
        form="similarity",
        shapes={"batch": batch, "views": [VIEWS, VIEWS], "embed_dim": DIM},
        make_inputs=partial(make_features, batch, device),
        function=distillation_cross_entropy,
        leaves=("student_a", "student_b", "student_scale"),
        rtol=1e-4,
        others={},
        bars={},
    )


def dense_case(row_count: int, classes: int, device: str) -> Case:
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return Case(
        form="dense",
        shapes={"rows": row_count, "classes": classes, "dtype": str(dtype).removeprefix("torch.")},
        make_inputs=partial(make_logits, (row_count, classes), device, dtype),
        function=dense,
        leaves=("student_logits_MK",),
        rtol=5e-3 if on_gpu else 1e-4,
        others={"Liger KL": liger_kl} if on_gpu and liger_is_here() else {},
        bars={"oracle": EAGER_BAR, "Liger KL": LIGER_BAR} if on_gpu else {},
    )


def forward_backward(function: Callable[..., Tensor], leaves: tuple[str, ...], inputs: Inputs) -> dict[str, Tensor]:
    loss = function(**inputs)
    gradients = torch.autograd.grad(loss, [inputs[name] for name in leaves])
    return {"loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(case: Case, backend: str) -> None:
    """Loss and gradients against the oracle."""
    found, expected = (
        forward_backward(partial(case.function, backend=name), case.leaves, case.make_inputs(0))
        for name in (backend, "eager")
    )
    assert_agree(found, expected, rtol=case.rtol)


def run_once(case_of: Callable[[], Case], backend: str) -> None:
    case = case_of()
    forward_backward(partial(case.function, backend=backend), case.leaves, case.make_inputs(0))


def compiled_oracle(case: Case) -> Callable[..., Tensor] | None:
    """The oracle through torch.compile, warmed up; None, with the reason printed, where it does not compile."""
    compiled = torch.compile(partial(case.function, backend="eager"))
    try:
        forward_backward(compiled, case.leaves, case.make_inputs(0))
    except Exception as error:  # a missing compiler, mostly
        print(f"without the compiled oracle: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return None
    return compiled


def plan(
    cases: Iterable[tuple[Callable[[], Case], Callable[[], Case]]], device: str, options: Options
) -> Iterator[parts.Part]:
    """What is measured, in order: name and function. cases: each at its size, and small, to warm the allocator up."""
    for case_of, small_case_of in cases:
        case = case_of()
        size = "x".join(str(value) for key, value in case.shapes.items() if key in ("batch", "rows", "classes"))
        row = partial(
            Row, name="distill", device=rows.device_name(device), shapes={**case.shapes, "backend": options.backend}
        )
        baselines: dict[str, Callable[..., Tensor]] = {"oracle": partial(case.function, backend="eager"), **case.others}
        of_time = partial(row, metric=f"{case.form}_ms/{size}")
        for name, baseline in baselines.items():
            time = partial(measure_time, case, name, baseline, device, options, of_time)
            yield f"{case.form} {size} against {name}", time
        peak = partial(measure_peak, case_of, small_case_of, device, options.backend)
        yield f"peak memory of {case.form} {size}", partial(peak, f"{case.form}_peak_mib/{size}", row)
        # Compiling takes long: last, and in a part of its own.
        yield (
            f"{case.form} {size} against the oracle, compiled",
            partial(measure_compiled, case, device, options, of_time),
        )


def measure_time(
    case: Case, name: str, baseline: Callable[..., Tensor], device: str, options: Options, row: Callable[..., Row]
) -> list[Row]:
    """Against one baseline. row: makes a row of the metric."""
    timing = interleave(
        partial(forward_backward, baseline, case.leaves),
        partial(forward_backward, partial(case.function, backend=options.backend), case.leaves),
        case.make_inputs,
        check=partial(check, case, options.backend),
        device=device,
        repeats=options.repeats,
    )
    ours = row(value=timing.candidate_median_ms, unit="ms", baseline=name, ratio=timing.ratio, bar=case.bars.get(name))
    return [replace(ours, metric=f"{ours.metric}/{name}", value=timing.baseline_median_ms, **UNCOMPARED), ours]


def measure_compiled(case: Case, device: str, options: Options, row: Callable[..., Row]) -> list[Row]:
    """Against the oracle through torch.compile, where that works."""
    compiled = compiled_oracle(case)
    return [] if compiled is None else measure_time(case, "oracle, compiled", compiled, device, options, row)


def measure_peak(
    case_of: Callable[[], Case],
    small_case_of: Callable[[], Case],
    device: str,
    backend: str,
    metric: str,
    row: Callable[..., Row],
) -> list[Row]:
    """Peak memory against the oracle's."""
    eager_mib, product_mib = (
        peak_mib(partial(run_once, case_of, name), device=device, settle=partial(run_once, small_case_of, name))
        for name in ("eager", backend)
    )
    return [
        row(metric=f"{metric}/oracle", value=eager_mib, unit="MiB"),
        row(metric=metric, value=product_mib, unit="MiB", baseline="oracle", ratio=product_mib / eager_mib),
    ]


@click.command(name="distill", help=__doc__, context_settings={"show_default": True})
@click.option("--batch", "batches", type=click.IntRange(2), multiple=True, help="Samples. [default: 512, 1024]")
@click.option("--rows", "row_count", type=click.IntRange(1), help="Rows of dense logits. [default: 256; GPU: 2048]")
@click.option("--classes", type=click.IntRange(1), help="Classes of dense logits. [default: 16384; GPU: 65536]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--backend", default="auto", help="Backend of both operations.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(
    batches: tuple[int, ...],
    row_count: int | None,
    classes: int | None,
    device: str,
    backend: str,
    repeats: int,
    out: Path | None,
) -> None:
    usual = (2048, 65536) if device == "cuda" else (256, 16384)
    options = Options(backend, repeats)
    sizes = row_count or usual[0], classes or usual[1]
    cases = [(partial(dense_case, *sizes, device), partial(dense_case, 8, 64, device))]
    for batch in batches or (512, 1024):
        cases.append((partial(similarity_case, batch, device), partial(similarity_case, 8, device)))
    parts.measure(plan(cases, device, options), out)


sweeps.offer(command, "distill")

if __name__ == "__main__":
    command()
