"""Time, memory and communication of an optimizer step on a layout: a model made of counts and assumed rates.

Nothing here is a measurement. docs/scale.md has the formulas in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from cosmos_fast.config import ModelConfig, TrainConfig
from cosmos_fast.config.deepspeed import zero_stage
from cosmos_fast.engine.build import check_division
from cosmos_fast.engine.plan.hardware import Assumptions
from cosmos_fast.engine.plan.layout import STAGES, Layout
from cosmos_fast.engine.plan.memory import memory_bytes
from cosmos_fast.engine.plan.traffic import (
    Transfer,
    loss_transfers,
    original_gathers,
    original_loss_bytes,
    state_transfers,
)
from cosmos_fast.model import create_model
from cosmos_fast.model.flops import SampleFlops, sample_flops
from cosmos_fast.utils.errors import UserError

# Share of the forward pass that the backward pass repeats: of 24 width² a token in a block, 8 or 16 are made anew.
_REMADE = {"none": 0.0, "mlp": 1 / 3, "blocks": 2 / 3}
# Bytes of memory traffic a parameter in an optimizer step: gradient norm 4, AdamW 28, teacher's average 8.
_OPTIMIZER_BYTES = 40
_GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """What is expected of one layout, a rank and optimizer step.

    memory_gib: by what it is for, the assumed reserve included. compute_ms: by phase. transfers: all of them, with
    transfer_ms in the same order. exposed_ms: the part of the transfers that computing does not hide.
    flops: of a rank that the result needs, nothing that is computed twice.
    """

    layout: Layout
    memory_gib: dict[str, float]
    limit_gib: float
    compute_ms: dict[str, float]
    transfers: list[Transfer]
    transfer_ms: list[float]
    exposed_ms: float
    flops: float
    peak_tflops: float
    original_loss_bytes: float
    original_gathers: int

    @property
    def total_gib(self) -> float:
        """Memory of one rank."""
        return sum(self.memory_gib.values())

    @property
    def fits(self) -> bool:
        """Whether the GPU has as much."""
        return self.total_gib <= self.limit_gib

    @property
    def step_ms(self) -> float:
        """Computing, and the transfers that it does not hide."""
        return sum(self.compute_ms.values()) + self.exposed_ms

    @property
    def samples_per_s(self) -> float:
        """Of all ranks."""
        return 1e3 * self.layout.global_batch / self.step_ms

    @property
    def mfu_pct(self) -> float:
        """Percent of the published rate, over the whole step."""
        return 100 * self.flops / (self.step_ms * 1e-3 * self.peak_tflops * 1e12)

    def received_bytes(self, prefix: str = "") -> float:
        """What a rank receives in the transfers whose purpose begins so."""
        chosen = [one for one in self.transfers if one.purpose.startswith(prefix)]
        return sum(one.received_bytes(self.layout.ranks) for one in chosen)


def count_parameters(config: TrainConfig) -> int:
    """Of the student; no weights are allocated."""
    return _count_parameters(config.model)


@cache
def _count_parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(model).parameters())


def forecast(
    config: TrainConfig, layout: Layout, rates: Assumptions, gpus_per_node: int, parameters: int | None = None
) -> Forecast:
    """The step of `config` on `layout`; its own batch size, accumulation and precision are not read.

    parameters: count_parameters(config), where it is known already.
    """
    parameters = count_parameters(config) if parameters is None else parameters
    memory = {name: size / _GIB for name, size in memory_bytes(config, parameters, layout).items()}
    flops = _sample_flops(config, layout, rates)
    compute = _compute_ms(config, layout, rates, flops, parameters)
    transfers = [*loss_transfers(config, layout), *state_transfers(config, parameters, layout)]
    times = [transfer_ms(one, layout.ranks, rates, gpus_per_node) for one in transfers]
    return Forecast(
        layout=layout,
        memory_gib={**memory, "reserve": rates.reserve_gib},
        limit_gib=rates.memory_gb * 1e9 / _GIB,
        compute_ms=compute,
        transfers=transfers,
        transfer_ms=times,
        exposed_ms=_exposed_ms(transfers, times, compute, rates.overlap),
        flops=layout.rank_samples * flops.training,
        peak_tflops=rates.peak_tflops,
        original_loss_bytes=original_loss_bytes(config, layout),
        original_gathers=original_gathers(config, layout),
    )


def transfer_ms(transfer: Transfer, ranks: int, rates: Assumptions, gpus_per_node: int) -> float:
    """A ring at the rate of its slowest part, and a latency that grows with the logarithm of the ranks.

    A ring crosses the border of each server once, and each network card carries a ring of its own: so the network's
    rate is that of the whole server.
    """
    link_gb_s = rates.link_gb_s if ranks <= gpus_per_node else min(rates.link_gb_s, rates.network_gb_s)
    latency_ms = transfer.calls * rates.latency_us * 1e-3 * math.log2(ranks)
    return latency_ms + 1e3 * transfer.received_bytes(ranks) / (1e9 * link_gb_s * rates.link_share)


def largest_batches(
    config: TrainConfig,
    layout: Layout,
    rates: Assumptions,
    gpus_per_node: int,
    parameters: int,
) -> Forecast:
    """The same global batch in as few micro-batches as memory allows; in one of a sample each if nothing fits."""
    samples = layout.rank_samples
    for size in _divisors(samples):
        split = replace(layout, batch_size=size, accumulate_steps=samples // size)
        found = forecast(config, split, rates, gpus_per_node, parameters)
        if found.fits:
            break
    return found


def _divisors(number: int) -> list[int]:
    """The largest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)


def best_stage(forecasts: Sequence[Forecast]) -> Forecast:
    """The lowest stage that fits and is within 1 % of the fastest; if none fits, the one that needs least memory.

    Smaller differences are below what such a model can tell.
    """
    fitting = [one for one in forecasts if one.fits]
    if not fitting:
        return min(forecasts, key=lambda one: one.total_gib)
    fastest_ms = min(one.step_ms for one in fitting)
    return min((one for one in fitting if one.step_ms <= 1.01 * fastest_ms), key=lambda one: one.layout.stage)


def stages_of(
    config: TrainConfig, ranks: int, global_batch: int, rates: Assumptions, *, precision: str, gpus_per_node: int
) -> list[Forecast]:
    """Every ZeRO stage that `train` takes, with the largest micro-batch that fits.

    global_batch: a multiple of ranks.

    Raises:
        UserError: a run that no stage can take.
    """
    parameters, refused = count_parameters(config), refused_stages(config, ranks)
    if len(refused) == len(STAGES):
        raise UserError(refused[zero_stage(config)])
    layouts = [
        Layout(
            ranks=ranks,
            stage=stage,
            batch_size=global_batch // ranks,
            precision=precision,
            all_negatives=config.run.negatives == "all",
        )
        for stage in STAGES
        if stage not in refused
    ]
    return [largest_batches(config, layout, rates, gpus_per_node, parameters) for layout in layouts]


def refused_stages(config: TrainConfig, ranks: int) -> dict[int, str]:
    """What `train` says to a ZeRO stage on so many ranks, of those that it refuses. One rank needs no stage."""
    found = {}
    for stage in STAGES if ranks > 1 else ():
        try:
            check_division(config, stage)
        except UserError as error:
            found[stage] = str(error)
    return found


def _sample_flops(config: TrainConfig, layout: Layout, rates: Assumptions) -> SampleFlops:
    views, context = config.data.views, config.model.text.context_length
    lengths = [rates.global_caption_tokens or context] * views.global_captions
    lengths += [rates.local_caption_tokens or context] * views.local_captions
    return sample_flops(config.model, views, caption_tokens=lengths, global_batch=layout.loss_batch)


def _compute_ms(
    config: TrainConfig, layout: Layout, rates: Assumptions, flops: SampleFlops, parameters: int
) -> dict[str, float]:
    per_ms = rates.peak_tflops * 1e9 * rates.mfu
    samples = layout.rank_samples
    again = _REMADE[config.compute.checkpoint_activations]
    second = (layout.accumulate_steps - 1) / layout.accumulate_steps if layout.all_negatives else 0.0
    counts = {
        "teacher": flops.teacher_forward,
        "student": flops.student_forward,
        "loss": flops.loss + flops.loss_recomputed,
        "backward": flops.student_backward + again * flops.student_forward,
        "recompute": second * flops.student_forward,
    }
    own = parameters / (layout.ranks if layout.stage >= 1 else 1)
    optimizer_ms = 1e3 * own * _OPTIMIZER_BYTES / (rates.hbm_gb_s * 1e9 * rates.hbm_share)
    return {**{phase: samples * count / per_ms for phase, count in counts.items()}, "optimizer": optimizer_ms}


def _exposed_ms(
    transfers: Sequence[Transfer], times: Sequence[float], compute: dict[str, float], overlap: float
) -> float:
    """What is left of each group of transfers when the computing beside it has hidden its share."""
    groups: dict[str, float] = {}
    for one, ms in zip(transfers, times, strict=True):
        groups[one.beside] = groups.get(one.beside, 0.0) + ms
    return sum(max(0.0, ms - overlap * compute.get(beside, 0.0)) for beside, ms in groups.items())
