"""Attention of packed short sequences, forward and backward: one backend against the others and against padding.

Settings: global crops (197 tokens), local crops (37), captions (about 39, causal). Baselines: the original's way, SDPA
on sequences padded to the longest, with its float mask where causal; and every other backend that runs here. On a GPU
in bf16, from CUDA graphs, forward and backward apart, and Triton's kernels with one and with three sequences a program.
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

from benchmarks import graphs, rows, sweeps
from benchmarks.harness import MIN_REPEATS, assert_agree, interleave
from benchmarks.rows import Row
from benchmarks.sweep import Rates, copy_bytes_per_s
from cosmos_fast.model.packing import pack_text
from cosmos_fast.ops import backends
from cosmos_fast.ops.attention import OP, Sequences, packed_attention
from cosmos_fast.utils.peak_rates import matmul_flops_per_s
from cosmos_kernels import attention_parts, reference

HEADS, HEAD_DIM = 12, 64
PADDED, BY_KERNELS = "SDPA on padded sequences", "Triton, sequences a program: "
PADDED_BAR, OTHER_BAR = 1 / 1.3, 1.0
GPU_COUNTS = {"global crops": 512, "local crops": 1536, "captions": 1792}
CPU_SHARE = 32  # a CPU gets one of so many sequences
CHECKED_TOKENS = 2000
CONTEXT, CAPTION_TOKENS = 77, (12, 66)  # mean 39


class Case(NamedTuple):
    """Which sequences. padded: the length that the original pads them to."""

    name: str
    sequences: Sequences
    lengths: list[int]
    padded: int
    causal: bool


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
        shapes |= {"heads": HEADS, "head_dim": HEAD_DIM, "causal": case.causal, "backend": self.backend}  # type: ignore[dict-item]
        return Row(
            name="attention",
            device=rows.device_name(self.device),
            shapes=dict(shapes),
            metric=f"{metric}/{case.name}",
            value=value,
            unit=unit,
            **more,  # type: ignore[arg-type]
        )


class Inputs(NamedTuple):
    """The same tokens twice, with gradients: packed [T, 3, H, d], and padded [N, L, 3, H, d]."""

    packed: Tensor
    padded: Tensor


def make_case(name: str, count: int, setting: Setting) -> Case:
    if name == "captions":
        ids = torch.zeros(count, CONTEXT, dtype=torch.long)
        low, high = CAPTION_TOKENS
        lengths = torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(0))
        ids[torch.arange(count), lengths - 1] = 1
        sequences = pack_text(ids, backend=setting.backend, device=torch.device(setting.device)).layout.sequences
    else:
        length = {"global crops": 197, "local crops": 37}[name]
        sequences = Sequences.from_groups([(count, length)], device=setting.device)
    lengths = [length for many, length in sequences.query_groups for _ in range(many)]
    return Case(name, sequences, lengths, CONTEXT if name == "captions" else max(lengths), name == "captions")


def make_inputs(case: Case, setting: Setting, seed: int) -> Inputs:
    generator = torch.Generator(setting.device).manual_seed(seed)
    shape = (sum(case.lengths), 3, HEADS, HEAD_DIM)
    packed = torch.randn(shape, generator=generator, device=setting.device).to(setting.dtype)
    padded = packed.new_zeros(len(case.lengths), case.padded, *shape[1:])
    padded.flatten(0, 1)[padded_rows(case).to(setting.device)] = packed
    return Inputs(packed.requires_grad_(), padded.requires_grad_())


def padded_rows(case: Case) -> Tensor:
    """[T] the row of the flattened padded tensor where each packed token lies."""
    return torch.cat([i * case.padded + torch.arange(length) for i, length in enumerate(case.lengths)])


def attend_packed(inputs: Inputs, case: Case, backend: str) -> Tensor:
    return packed_attention(*inputs.packed.unbind(1), case.sequences, causal=case.causal, backend=backend)


def attend_padded(inputs: Inputs, mask: Tensor | None) -> Tensor:
    q, k, v = inputs.padded.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def causal_mask(case: Case, setting: Setting) -> Tensor | None:
    """The original's: zeros, and minus infinity above the diagonal."""
    full = torch.full((case.padded, case.padded), -torch.inf, device=setting.device, dtype=setting.dtype)
    return full.triu(1) if case.causal else None


def forward_backward(call: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    output = call(inputs)
    output.backward(torch.linspace(-1, 1, output.numel(), device=output.device, dtype=output.dtype).view_as(output))
    return output.detach()


def check(case: Case, setting: Setting, backend: str) -> None:
    """Output and gradient of the first sequences against the oracle in fp64."""
    few = max(1, sum(total <= CHECKED_TOKENS for total in accumulate(case.lengths)))
    lengths = case.lengths[:few]
    part = case._replace(sequences=Sequences.from_lengths(lengths, device=setting.device), lengths=lengths)
    inputs = make_inputs(part, setting, 0)
    ours = {"output": forward_backward(lambda x: attend_packed(x, part, backend), inputs)}
    exact = Inputs(inputs.packed.detach().double().requires_grad_(), inputs.padded)
    oracle = partial(reference.packed_attention, query_lengths=lengths, key_lengths=lengths, causal=case.causal)
    truth = {"output": forward_backward(lambda x: oracle(*x.packed.unbind(1))[0], exact)}
    assert inputs.packed.grad is not None
    assert exact.packed.grad is not None
    ours["gradient"], truth["gradient"] = inputs.packed.grad, exact.packed.grad
    assert_agree(ours, truth, rtol=2e-2 if setting.dtype == torch.bfloat16 else 1e-4)


def others(case: Case, setting: Setting) -> list[str]:
    """The backends that run here beside the measured one; says which do not, and why."""
    probe = make_inputs(case._replace(lengths=case.lengths[:1]), setting, 0).packed.detach()
    found = []
    for row in backends.table():
        if row["op"] != OP or row["backend"] == setting.backend:
            continue
        try:
            one = Sequences.from_lengths(case.lengths[:1], device=setting.device)
            packed_attention(*probe.unbind(1), one, causal=case.causal, backend=row["backend"])
            found.append(row["backend"])
        except Exception as error:  # a package that is missing or broken raises anything
            click.echo(f"left out: {row['backend']}: {str(error).splitlines()[0]}")
    return found


def measure_time(case: Case, setting: Setting) -> Iterator[Row]:
    """Wall time on a CPU."""
    baselines: dict[str, Callable[[Inputs], Tensor]] = {
        PADDED: partial(attend_padded, mask=causal_mask(case, setting)),
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
    calls[PADDED] = partial(attend_padded, static, causal_mask(case, setting))
    calls |= {name: partial(attend_packed, static, case, name) for name in others(case, setting)}
    captured = {}
    for name, call in calls.items():
        leaf = static.padded if name == PADDED else static.packed
        try:
            captured[name] = graphs.capture(call, [leaf])
        except Exception as error:  # some packages copy lengths to the host
            torch.cuda.synchronize()
            click.echo(f"left out: {name}: not captured: {str(error).splitlines()[0]}")
    forward = {name: found.forward for name, found in captured.items()} | shared_graphs(case, static, setting)
    backward = {name: found.backward for name, found in captured.items() if found.backward is not None}
    rates = Rates(matmul_flops_per_s(setting.device, setting.dtype), copy_bytes_per_s(setting.device))
    for metric, sides, work in zip(("forward_us", "backward_us"), (forward, backward), least_work(case), strict=True):
        times = graphs.interleave_us(sides, refresh, setting.repeats)
        value = statistics.median(times["ours"])
        yield setting.row(case, metric, value, "us", floor_pct=100e3 * rates.floor_ms(*work) / value)
        for name in times.keys() - {"ours"}:
            more: dict[str, Any] = {"baseline": name, "ratio": graphs.median_ratio(times["ours"], times[name])}
            if not name.startswith(BY_KERNELS):
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
            *static.packed.unbind(1),
            *(sequences.cu_queries, sequences.cu_keys, sequences.max_queries, sequences.max_keys, case.causal),
            sequences_per_program=share,
        )
        found[f"{BY_KERNELS}{share}"] = graphs.capture(lambda call=call: call()[0]).forward
    return found


def least_work(case: Case) -> tuple[tuple[float, float], tuple[float, float]]:
    """(operations, bytes) of forward and of backward: two products and five; q, k, v, out, and their gradients too."""
    pairs = sum(length * (length + 1) / 2 if case.causal else length**2 for length in case.lengths)
    tensor_bytes = 2.0 * sum(case.lengths) * HEADS * HEAD_DIM
    product = 2.0 * pairs * HEADS * HEAD_DIM
    return (2 * product, 4 * tensor_bytes), (5 * product, 8 * tensor_bytes)


@click.command(name="attention", help=__doc__, context_settings={"show_default": True})
@click.option("--case", "names", type=click.Choice(list(GPU_COUNTS)), multiple=True, default=list(GPU_COUNTS))
@click.option("--count", type=click.IntRange(1), help="Sequences; default: 512, 1536, 1792 on a GPU, a 32nd on a CPU.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--backend", help="What is measured; default: triton on a GPU, sdpa on a CPU.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(
    names: tuple[str, ...], count: int | None, device: str, backend: str | None, repeats: int, out: Path | None
) -> None:
    setting = Setting(device, backend or ("triton" if device == "cuda" else "sdpa"), repeats)
    found: list[Row] = []
    for name in names:
        default = GPU_COUNTS[name] if device == "cuda" else GPU_COUNTS[name] // CPU_SHARE
        case = make_case(name, count or default, setting)
        found += measure_graphs(case, setting) if device == "cuda" else measure_time(case, setting)
        path = rows.write(found, out)  # after each case: a run that is stopped leaves what it has
    rows.show(found)
    click.echo(f"wrote {path}")


sweeps.offer(command, "attention")

if __name__ == "__main__":
    command()
