"""Attention of packed short sequences, forward and backward: one backend against the others and against padding.

Settings: global crops (197 tokens), local crops (37), captions (about 39, causal); and the same with one query a
sequence, as the last block of a tower has it, which reads the features from one token. Baselines: the original's way,
SDPA on sequences padded to the longest, with its float mask where causal; and every other backend that runs here. On a
GPU in bf16, from CUDA graphs, forward and backward apart, and Triton's kernels with one to three sequences a program.
On a CPU in fp32 on few sequences, and only backends that take CPU tensors: the figures say nothing of a GPU.

Axes: N sequences, L tokens, T packed tokens, H heads, d head width.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attention_cases, graphs, parts, rows, sweeps
from benchmarks.attention_cases import NAMES, ONE_QUERY, Case, Inputs, make_case, padded_mask, seen_rows
from benchmarks.harness import MIN_REPEATS, assert_agree, interleave
from benchmarks.rows import Row
from benchmarks.sweep import Rates, copy_bytes_per_s
from cosmos_fast.ops import backends
from cosmos_fast.ops.attention import OP, packed_attention
from cosmos_fast.utils.peak_rates import matmul_flops_per_s
from cosmos_kernels import attention_parts, reference

HEADS, HEAD_DIM = 12, 64
PADDED, BY_KERNELS = "SDPA on padded sequences", "Triton, sequences a program: "
PADDED_BAR, OTHER_BAR = 1 / 1.3, 1.0
GPU_COUNTS = {"global crops": 512, "local crops": 1536, "captions": 1792}
CPU_SHARE = 32  # a CPU gets one of so many sequences
CHECKED_TOKENS = 2000


class Setting(NamedTuple):
    """What one run measures. `dtype` is bf16 on a GPU, else fp32."""

    device: str
    backend: str
    repeats: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def row(self, case: Case, metric: str, value: float, unit: str, **more: object) -> Row:
        shapes = {"sequences": len(case.lengths), "tokens": sum(case.lengths), "longest": max(case.lengths)}
        shapes |= {"heads": HEADS, "head_dim": HEAD_DIM, "queries": sum(case.queries)}
        more_shapes = {"causal": case.causal, "backend": self.backend}
        return Row(
            name="attention",
            device=rows.device_name(self.device),
            shapes={**shapes, **more_shapes},
            metric=f"{metric}/{case.name}",
            value=value,
            unit=unit,
            **more,  # type: ignore[arg-type]
        )


def make_inputs(case: Case, setting: Setting, seed: int) -> Inputs:
    return attention_cases.make_inputs(case, HEADS, HEAD_DIM, setting.dtype, seed)


def attend_packed(inputs: Inputs, case: Case, backend: str) -> Tensor:
    return packed_attention(*inputs.heads(), case.sequences, causal=case.causal, backend=backend)


def attend_padded(inputs: Inputs, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(*inputs.padded_heads(), attn_mask=mask).transpose(1, 2)


def forward_backward(call: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    output = call(inputs)
    output.backward(torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output))
    return output.detach()


def check(case: Case, setting: Setting, backend: str) -> None:
    """Output and gradients of the first sequences against the oracle in fp64."""
    part = case.first(max(1, sum(total <= CHECKED_TOKENS for total in accumulate(case.lengths))))
    inputs = make_inputs(part, setting, 0)
    ours = results(lambda x: attend_packed(x, part, backend), inputs)

    def oracle(x: Inputs) -> Tensor:
        q, k, v = x.heads()
        seen = seen_rows(part).to(q.device)
        found, _ = reference.packed_attention(q, k[seen], v[seen], part.queries, part.seen, part.causal)
        return found

    truth = results(oracle, Inputs(*(leaf.detach().double().requires_grad_() for leaf in inputs)))
    assert_agree(ours, truth, rtol=2e-2 if setting.dtype == torch.bfloat16 else 1e-4)


def results(call: Callable[[Inputs], Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """Output and gradients of one call on packed inputs."""
    found = {"output": forward_backward(call, inputs)}
    for i, leaf in enumerate(inputs.leaves(padded=False)):
        assert leaf.grad is not None
        found[f"gradient {i}"] = leaf.grad
    return found


def others(case: Case, setting: Setting) -> list[str]:
    """The backends that run here beside the measured one; says which do not, and why. Not Triton's interpreter."""
    one = case.first(1)
    heads = [part.detach() for part in make_inputs(one, setting, 0).heads()]
    found = []
    for row in backends.table():
        interpreted = setting.device == "cpu" and row["backend"] in backends.GPU_BACKENDS
        if row["op"] != OP or row["backend"] == setting.backend or interpreted:
            continue
        try:
            packed_attention(*heads, one.sequences, causal=case.causal, backend=row["backend"])
            found.append(row["backend"])
        except Exception as error:  # a package that is missing or broken raises anything
            click.echo(f"left out: {row['backend']}: {str(error).splitlines()[0]}")
    return found


def measure(name: str, count: int | None, setting: Setting) -> Iterator[Row]:
    """Rows of one case, of `count` sequences."""
    default = GPU_COUNTS[name.removesuffix(ONE_QUERY)] // (1 if setting.device == "cuda" else CPU_SHARE)
    case = make_case(name, count or default, setting.backend, setting.device)
    return measure_graphs(case, setting) if setting.device == "cuda" else measure_time(case, setting)


def measure_time(case: Case, setting: Setting) -> Iterator[Row]:
    """Wall time on a CPU."""
    baselines: dict[str, Callable[[Inputs], Tensor]] = {
        PADDED: partial(attend_padded, mask=padded_mask(case, setting.dtype)),
        **{name: partial(attend_packed, case=case, backend=name) for name in others(case, setting)},
    }
    for baseline, call in baselines.items():
        timing = interleave(
            partial(forward_backward, call),
            partial(forward_backward, partial(attend_packed, case=case, backend=setting.backend)),
            partial(make_inputs, case, setting),
            check=partial(check, case, setting, setting.backend),
            repeats=setting.repeats,
        )
        more = {"baseline": baseline, "ratio": timing.ratio}
        yield setting.row(case, "forward_backward_ms", timing.candidate_median_ms, "ms", **more)


def measure_graphs(case: Case, setting: Setting) -> Iterator[Row]:
    """GPU time of forward and backward, replayed from CUDA graphs."""
    check(case, setting, setting.backend)
    static = make_inputs(case, setting, 0)

    def refresh(seed: int) -> None:
        with torch.no_grad():
            for old, new in zip(static, make_inputs(case, setting, seed), strict=True):
                old.copy_(new)

    calls: dict[str, Callable[[], Tensor]] = {"ours": partial(attend_packed, static, case, setting.backend)}
    calls[PADDED] = partial(attend_padded, static, padded_mask(case, setting.dtype))
    calls |= {name: partial(attend_packed, static, case, name) for name in others(case, setting)}
    captured = {}
    for name, call in calls.items():
        try:
            captured[name] = graphs.capture(call, static.leaves(padded=name == PADDED))
        except Exception as error:  # some packages copy lengths to the host
            if name == "ours":
                raise
            torch.cuda.synchronize()
            click.echo(f"left out: {name}: not captured: {str(error).splitlines()[0]}")
    forward = {name: found.forward for name, found in captured.items()} | shared_graphs(case, static, setting)
    backward = {name: found.backward for name, found in captured.items() if found.backward is not None}
    rates = Rates(matmul_flops_per_s(setting.device, setting.dtype), copy_bytes_per_s(setting.device))
    for metric, sides, work in zip(("forward_us", "backward_us"), (forward, backward), least_work(case), strict=True):
        times = graphs.interleave_us(sides, refresh, setting.repeats)
        value = statistics.median(times["ours"])
        yield setting.row(case, metric, value, "us", floor_pct=100e3 * rates.floor_ms(*work) / value)
        for name in sorted(times.keys() - {"ours"}):
            more: dict[str, Any] = {"baseline": name, "ratio": graphs.median_ratio(times["ours"], times[name])}
            if not name.startswith(BY_KERNELS) and not case.pruned:
                more["bar"] = PADDED_BAR if name == PADDED else OTHER_BAR
            yield setting.row(case, metric, value, "us", **more)


def shared_graphs(case: Case, static: Inputs, setting: Setting) -> dict[str, torch.cuda.CUDAGraph]:
    """Triton's forward pass with another number of sequences a program."""
    if setting.backend != "triton":
        return {}
    from cosmos_kernels import attention_triton

    sequences = case.sequences
    found = {}
    for share in (1, 2, 3):
        if share > 1 and share * sequences.max_keys > attention_parts.MAX_TILE:
            break
        call = partial(
            attention_triton.forward,
            *static.heads(),
            *(sequences.cu_queries, sequences.cu_keys, sequences.max_queries, sequences.max_keys, case.causal),
            sequences_per_program=share,
        )
        found[f"{BY_KERNELS}{share}"] = graphs.capture(lambda call=call: call()[0]).forward
    return found


def least_work(case: Case) -> tuple[tuple[float, float], tuple[float, float]]:
    """(operations, bytes) of forward and of backward: two products and five; q, k, v, out, and their gradients too."""
    row = HEADS * HEAD_DIM
    pairs = float(sum(case.seen))
    if not case.pruned:
        pairs = sum(length * (length + 1) / 2 if case.causal else float(length**2) for length in case.lengths)
    tensor_bytes = 2.0 * row * (2 * sum(case.queries) + 2 * sum(case.seen))  # q and out; k and v
    return (4 * pairs * row, tensor_bytes), (10 * pairs * row, 2 * tensor_bytes)


@click.command(name="attention", help=__doc__, context_settings={"show_default": True})
@click.option("--case", "names", type=click.Choice(NAMES), multiple=True, default=NAMES)
@click.option("--count", type=click.IntRange(1), help="Sequences; default: 512, 1536, 1792 on a GPU, a 32nd on a CPU.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--backend", help="What is measured; default: triton on a GPU, native on a CPU.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(
    names: tuple[str, ...], count: int | None, device: str, backend: str | None, repeats: int, out: Path | None
) -> None:
    setting = Setting(device, backend or ("triton" if device == "cuda" else "native"), repeats)
    parts.measure([(name, partial(measure, name, count, setting)) for name in names], out)


sweeps.offer(command, "attention")

if __name__ == "__main__":
    command()
