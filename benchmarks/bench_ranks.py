"""Steps of several ranks under ZeRO: time, memory and bytes, the teacher whole or in parts, and the plan's times.

Ranks are processes of this machine with one thread each and gloo between them; more ranks than cores share the cores.
Each case is measured in fresh processes; times of a whole teacher and one in parts are taken in turn. `plan_step_ms` is
what `cosmos-fast plan` says, given the rates measured here and the share of the products' rate that one process
reaches. The losses are held to the original's 160 gathers. With --device cuda only the rates are measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import parts, rank_losses, rank_steps, rows
from benchmarks.harness import MIN_REPEATS
from benchmarks.rank_plan import fitted_mfu, predicted
from benchmarks.rank_start import run_ranks
from benchmarks.rank_steps import Case
from benchmarks.rows import Row
from benchmarks.sweep import copy_bytes_per_s
from cosmos_fast.engine.plan import Forecast, count_parameters
from cosmos_fast.utils.memory import MIB
from cosmos_fast.utils.peak_rates import matmul_flops_per_s

# Ranks -> stages; those of four take long where they share two cores, and stage 2 is much like stage 1.
WORLDS = {2: (0, 1, 2, 3), 4: (0, 1, 3)}
LOSS_SAMPLES = 16
CALLS_BAR, BYTES_BAR = 8 / 160, 1 / 20
# Metric -> its unit, and what of all ranks stands in the row.
COSTS = {"peak_mib": ("MiB", max), "received_mib": ("MiB", statistics.mean), "collectives": ("", max)}


@dataclass
class Setting:
    """batch: samples of a rank. more: overrides of the configuration. rate_s: seconds that each rate is measured for.
    What has been measured so far follows."""

    batch: int
    repeats: int
    more: tuple[str, ...] = ()
    rate_s: float = 1.0
    rates: dict[int, dict[str, float]] = field(default_factory=dict)
    mfu: float = 0.0

    def predicted(self, case: Case, world: int) -> Forecast:
        """By the rates measured so far."""
        return predicted(case, world, self.batch, self.rates[world], self.mfu, self.more)

    def row(self, metric: str, value: float, unit: str, **more: Any) -> Row:
        """metric: what/ranks, case."""
        shapes = {
            "samples_a_rank": self.batch,
            "parameters": count_parameters(Case(None).config(self.batch, "", *self.more)),
        }
        return Row(
            name="ranks", device=rows.device_name("cpu"), shapes=shapes, metric=metric, value=value, unit=unit, **more
        )


def losses(setting: Setting, world: int) -> Iterator[Row]:
    """Collectives, bytes and time of one step's losses, against a gather of both sides for each pair of views."""
    ranks = run_ranks(rank_losses.measure, world, LOSS_SAMPLES, setting.repeats)
    first, name, against = ranks[0], f"{world} ranks", {"baseline": "the original's gathers"}

    def share(metric: str, value: str, other: str, unit: str, divisor: float, **more: Any) -> Iterator[Row]:
        ratio = first[value] / first[other]
        yield setting.row(metric, first[value] / divisor, unit, ratio=ratio, **against, **more)

    yield setting.row(f"original_loss_collectives/{name}", first["original_calls"], "")
    yield setting.row(f"original_loss_received_kib/{name}", first["original_bytes"] / 1024, "KiB")
    yield from share(f"loss_collectives/{name}", "calls", "original_calls", "", 1, bar=CALLS_BAR)
    yield from share(f"loss_received_kib/{name}", "bytes", "original_bytes", "KiB", 1024, bar=BYTES_BAR)
    yield from share(f"loss_received_kib/{name}, bf16", "half_bytes", "original_bytes", "KiB", 1024, bar=BYTES_BAR)
    ratios = [ours / theirs for ours, theirs in zip(first["ms"], first["original_ms"], strict=True)]
    yield setting.row(f"original_loss_ms/{name}", statistics.median(first["original_ms"]), "ms")
    yield setting.row(
        f"loss_ms/{name}", statistics.median(first["ms"]), "ms", ratio=statistics.median(ratios), **against
    )


def machine(setting: Setting, world: int) -> Iterator[Row]:
    """Rates of a rank while all are at work: the slowest rank's."""
    values = count_parameters(Case(None).config(setting.batch, "", *setting.more))
    ranks = run_ranks(rank_steps.rates, world, values, setting.rate_s)
    pick = {name: max if name == "latency_us" else min for name in ranks[0]}
    setting.rates[world] = {name: pick[name](rank[name] for rank in ranks) for name in ranks[0]}
    for name, value in setting.rates[world].items():
        unit = {"peak_tflops": "TFLOP/s", "latency_us": "us"}.get(name, "GB/s")
        yield setting.row(f"rate_{name}/{_ranks(world)}", value, unit)


def costs(setting: Setting, world: int, cases: tuple[Case, ...]) -> Iterator[Row]:
    """Memory of the rank that needs most, mean bytes, collectives; a teacher in parts against a whole one."""
    found = []
    for case in cases:
        ranks = run_ranks(rank_steps.cost, world, case, setting.batch, setting.more)
        # Of a gather from one rank the others receive all, and that one nothing.
        found.append({metric: over_ranks(rank[metric] for rank in ranks) for metric, (_, over_ranks) in COSTS.items()})
        for metric, value in found[-1].items():
            against = {"baseline": "teacher whole", "ratio": value / found[0][metric]} if case.copy == "parts" else {}
            yield setting.row(f"{metric}/{_ranks(world)}, {case.name}", value, COSTS[metric][0], **against)
        if setting.mfu and case.stage is not None:
            planned = setting.predicted(case, world).received_bytes() / MIB
            against = {"baseline": "measured", "ratio": planned / found[-1]["received_mib"]}
            yield setting.row(f"plan_received_mib/{_ranks(world)}, {case.name}", planned, "MiB", **against)


def steps(setting: Setting, world: int, cases: tuple[Case, ...]) -> Iterator[Row]:
    """Times of a step, and what the plan says of them."""
    found = run_ranks(rank_steps.times, world, list(cases), setting.batch, setting.repeats, setting.more)[0]
    whole_ms = found[cases[0].name]
    for case in cases:
        name, taken_ms = f"{_ranks(world)}, {case.name}", found[case.name]
        ratios = [own / other for own, other in zip(taken_ms, whole_ms, strict=True)]
        against = {"baseline": "teacher whole", "ratio": statistics.median(ratios)} if case.copy == "parts" else {}
        measured_ms = statistics.median(taken_ms)
        yield setting.row(f"step_ms/{name}", measured_ms, "ms", **against)
        rates = setting.rates[world]
        if case.stage is None:
            setting.mfu = fitted_mfu(measured_ms, setting.batch, rates, setting.more)
            yield setting.row("mfu_pct/1 rank", 100 * setting.mfu, "%")
        elif setting.mfu:
            plan_ms = setting.predicted(case, world).step_ms
            yield setting.row(f"plan_step_ms/{name}", plan_ms, "ms", baseline="measured", ratio=plan_ms / measured_ms)


def plan(setting: Setting, worlds: Mapping[int, Sequence[int]]) -> Iterator[parts.Part]:
    """What is measured, in order."""
    for world in worlds:
        yield f"losses of {world} ranks", partial(losses, setting, world)
    yield "rates of 1 rank", partial(machine, setting, 1)
    yield "steps of 1 rank", partial(steps, setting, 1, (Case(None),))
    yield "memory of 1 rank", partial(costs, setting, 1, (Case(None),))
    for world, stages in worlds.items():
        yield f"rates of {world} ranks", partial(machine, setting, world)
        for stage in stages:
            cases = (Case(stage), Case(stage, "parts")) if stage else (Case(stage),)
            yield f"steps of {world} ranks, {cases[0].name}", partial(steps, setting, world, cases)
            yield f"memory of {world} ranks, {cases[0].name}", partial(costs, setting, world, cases)


def gpu_rates(setting: Setting) -> Iterator[Row]:
    """What the plan asks of a GPU."""
    row = partial(Row, name="ranks", device=rows.device_name("cuda"), shapes={"ranks": 1})
    yield row(metric="rate_peak_tflops/1 rank", value=matmul_flops_per_s("cuda", torch.bfloat16) / 1e12, unit="TFLOP/s")
    yield row(metric="rate_hbm_gb_s/1 rank", value=copy_bytes_per_s("cuda") / 1e9, unit="GB/s")


def _ranks(world: int) -> str:
    return "1 rank" if world == 1 else f"{world} ranks"


@click.command(name="ranks", help=__doc__, context_settings={"show_default": True})
@click.option("--batch", type=click.IntRange(1), default=2, help="Samples of a rank.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Ranks run on CPUs only.")
@click.option("--repeats", type=click.IntRange(MIN_REPEATS), default=MIN_REPEATS, help="Timed steps of each case.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; default: results folder.")
def command(batch: int, device: str, repeats: int, out: Path | None) -> None:
    setting = Setting(batch, repeats)
    if device == "cuda":
        parts.measure([("rates", partial(gpu_rates, setting))], out)
        return
    found = parts.measure(plan(setting, WORLDS), out)
    from benchmarks.rank_plots import draw

    picture = draw(found, (out or rows.RESULTS / rows.slug(found[0].device) / "ranks.json").parent)
    click.echo(f"wrote {picture}")


if __name__ == "__main__":
    command()
