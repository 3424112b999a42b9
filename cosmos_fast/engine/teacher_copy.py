"""The teacher's forward pass where ZeRO has divided the average that it runs on.

    whole   every rank keeps a copy of all weights, gathered after each step: 4 bytes a parameter, sent once a step
    parts   nothing is kept: the weights of a block are gathered before it runs and dropped behind it, those of the next
            block meanwhile: the memory of two blocks and the embeddings, sent once a micro-batch

Both run on the same numbers. Gathering what lies on one rank or two (stages 1 and 2, whose buffers stand one parameter
after the other) is a broadcast from each; what all ranks have an equal share of (stage 3) is an all-gather.

Axes: W ranks, S elements of a rank's part of one flat buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_fast.config import TrainConfig
from cosmos_fast.engine.zero_layout import FlatLayout, Slice
from cosmos_fast.model import CosmosModel
from cosmos_fast.utils.collectives import ALL_GATHER
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.memory_limits import memory_limits
from cosmos_fast.utils.phases import PhaseClock, no_clock
from cosmos_fast.utils.ranks import Ranks

Parts = Callable[[], Sequence[tuple[Tensor, FlatLayout]]]
"""This rank's parts of the average, [S] each, with their layouts: the same tensors, or others, at every call."""
# Where nothing was measured (GPUs), or parts are sent once a micro-batch: a whole copy stays that takes less of a
# rank's memory than this.
WHOLE_COPY_SHARE = 0.05


class TeacherCopy(Protocol):
    """What the teacher's modules run on. Every method is called by all ranks together."""

    def refresh(self) -> None:
        """The average has changed."""

    def whole(self) -> AbstractContextManager[object]:
        """In the block all weights are in the teacher's modules."""


def choose_copy(config: TrainConfig, stage: int, weights_bytes: int, ranks: Ranks) -> Literal["whole", "parts"]:
    """What run.teacher_copy comes to; the same on all ranks, by rank 0's memory.

    Raises:
        UserError: parts where something else holds on to the weights.
    """
    check_copy(config, stage)
    request = config.run.teacher_copy
    if request != "auto":
        return request
    if stage == 0 or _fixed(config) or not has_teacher_pass(config):
        return "whole"
    if ranks.device.type == "cpu" and config.run.accumulate_steps == 1:
        return "parts"  # measured on gloo ranks: less time and less memory in every stage (docs/scale.md)
    return "parts" if ranks.on_first(lambda: weights_bytes > WHOLE_COPY_SHARE * _rank_memory(ranks)) else "whole"


def check_copy(config: TrainConfig, stage: int) -> None:
    """UserError for run.teacher_copy=parts where something else holds on to the weights, or nothing is divided."""
    if config.run.teacher_copy != "parts":
        return
    if stage == 0:
        raise UserError(
            "run.teacher_copy=parts, but ZeRO stage 0 divides nothing: set deepspeed.zero_optimization.stage, or "
            "run.teacher_copy=auto"
        )
    if fixed := _fixed(config):
        raise UserError(
            f"compute.{fixed[0]} needs weights that stay where they are: set run.teacher_copy=whole, or turn it off"
        )


def has_teacher_pass(config: TrainConfig) -> bool:
    """Whether steps run the teacher: plain CLIP has the average for its checkpoints and evaluations only."""
    return config.objective == "cosmos"


def _fixed(config: TrainConfig) -> list[str]:
    """What of compute.* holds on to the weights."""
    compute = config.compute
    return ["cuda_graphs"] * compute.cuda_graphs + ["linear=fp8"] * (compute.linear == "fp8")


def _rank_memory(ranks: Ranks) -> float:
    """Bytes that a rank may use: a GPU's, or its share of the host's."""
    try:
        total = memory_limits(ranks.device).total
    except OSError:
        return float("inf")
    return total / (1 if ranks.device.type == "cuda" else max(1, ranks.local_world_size))


class WholeTeacher:
    """A copy of all weights. gather: [S] of each rank -> [W, S]. runs: in every step; else it is brought up to date
    when the whole is asked for."""

    def __init__(self, teacher: CosmosModel, parts: Parts, gather: Callable[[Tensor], Tensor], *, runs: bool) -> None:
        self._parameters = dict(teacher.named_parameters())
        self._parts, self._gather, self._runs = parts, gather, runs
        self._is_old = False

    def refresh(self) -> None:
        self._is_old = True
        if self._runs:
            self._update()

    def _update(self) -> None:
        self._is_old = False
        for part, layout in self._parts():
            for name, whole in layout.assemble(self._gather(part)).items():
                self._parameters[name].data.copy_(whole)

    @contextmanager
    def whole(self) -> Iterator[None]:
        if self._is_old:
            self._update()
        yield


@dataclass(frozen=True)
class _Unit:
    """Parameters that are gathered together. by_rank: (buffer, slice) of all that each rank sends, in that order."""

    names: tuple[str, ...]
    by_rank: list[list[tuple[int, Slice]]]

    @property
    def counts(self) -> list[int]:
        """Elements that each rank sends."""
        return [sum(one.count for _, one in slices) for slices in self.by_rank]

    @property
    def even(self) -> bool:
        """Whether the ranks send about as much, so that an all-gather with a little padding does it."""
        return 4 * len(self.counts) * max(self.counts) <= 5 * sum(self.counts)


@dataclass
class _Gathering:
    """Under way: what each rank sends, to be read when all works are done; `source` lives until then."""

    by_rank: Sequence[Tensor]
    works: list[Any] = field(default_factory=list)
    source: Tensor | None = None

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class TeacherInParts:
    """No weights between the passes; see the top of the file."""

    def __init__(self, teacher: CosmosModel, parts: Parts, ranks: Ranks, clock: PhaseClock = no_clock) -> None:
        self._parameters = dict(teacher.named_parameters())
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        self._parts, self._ranks, self._clock = parts, ranks, clock
        self._on_the_way: dict[int, _Gathering] = {}
        self._is_whole = False
        passes = forward_units(teacher)
        used = {name for one in passes for name in one.names}
        self._units = [self._planned(one.names) for one in passes]
        self._rest = self._planned([name for name in self._parameters if name not in used])
        for number, one in enumerate(passes):
            for owner, name in one.calls:
                setattr(owner, name, self._around(getattr(owner, name), number))
        for unit in (*self._units, self._rest):
            self._drop(unit)

    def refresh(self) -> None:
        for gathering in self._on_the_way.values():  # of weights that are old now
            gathering.wait()
        self._on_the_way.clear()

    @contextmanager
    def whole(self) -> Iterator[None]:
        self.refresh()
        units = (*self._units, self._rest)
        for unit in units:
            self._fill(unit, self._start(unit))
        self._is_whole = True
        try:
            yield
        finally:
            self._is_whole = False
            for unit in units:
                self._drop(unit)

    def _around(self, run: Callable[..., Any], number: int) -> Callable[..., Any]:
        """`run` with the weights of a unit in place, and the next one's on their way."""

        def call(*arguments: Any, **named: Any) -> Any:
            if self._is_whole:
                return run(*arguments, **named)
            unit = self._units[number]
            gathering = self._on_the_way.pop(number, None) or self._start(unit)
            if number + 1 < len(self._units) and number + 1 not in self._on_the_way:
                self._on_the_way[number + 1] = self._start(self._units[number + 1])
            self._fill(unit, gathering)
            try:
                return run(*arguments, **named)
            finally:
                self._drop(unit)

        return call

    def _planned(self, names: Sequence[str]) -> _Unit:
        wanted, parts = set(names), self._parts()
        by_rank = [
            [
                (buffer, one)
                for buffer, (part, layout) in enumerate(parts)
                for one in layout.slices(rank, len(part))
                if one.name in wanted
            ]
            for rank in range(self._ranks.world_size)
        ]
        return _Unit(tuple(names), by_rank)

    @torch.inference_mode(False)  # parameters take no tensor that was made in it
    @torch.no_grad()
    def _start(self, unit: _Unit) -> _Gathering:
        """Begin to gather a unit."""
        rank, group, device, counts = self._ranks.rank, self._ranks.group, self._ranks.device, unit.counts
        parts = [part for part, _ in self._parts()]
        pieces = [parts[buffer][one.place : one.place + one.count] for buffer, one in unit.by_rank[rank]]
        own = torch.cat([piece.to(device) for piece in pieces]) if pieces else torch.empty(0, device=device)
        if group is None:
            return _Gathering([own])
        if unit.even:
            flat = own.new_empty(len(counts) * max(counts))
            padded = torch.nn.functional.pad(own, (0, max(counts) - len(own)))
            work = getattr(dist, ALL_GATHER)(flat, padded, group=group, async_op=True)
            return _Gathering(flat.split(max(counts)), [work], padded)
        slots = own.new_empty(sum(counts)).split(counts)
        slots[rank].copy_(own)
        senders = [(sender, slot) for sender, slot in enumerate(slots) if len(slot)]
        return _Gathering(slots, [dist.broadcast(slot, src, group=group, async_op=True) for src, slot in senders])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _fill(self, unit: _Unit, gathering: _Gathering) -> None:
        """The weights of a unit into its modules, once they are there."""
        with self._clock("communication"):
            gathering.wait()
        pieces: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in unit.names}
        for sent, slices in zip(gathering.by_rank, unit.by_rank, strict=True):
            position = 0
            for _, one in slices:
                pieces[one.name].append((one.start, sent[position : position + one.count]))
                position += one.count
        for name, found in pieces.items():
            ordered = [piece for _, piece in sorted(found, key=lambda piece: piece[0])]
            whole = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
            parameter = self._parameters[name]
            parameter.data = whole.view(self._shapes[name]).to(parameter.device)

    @torch.inference_mode(False)
    def _drop(self, unit: _Unit) -> None:
        for name in unit.names:
            parameter = self._parameters[name]
            parameter.data = parameter.data.new_empty(0)


@dataclass(frozen=True)
class ForwardUnit:
    """Weights that a part of the teacher's forward pass needs. calls: (module, method) that do that part."""

    calls: tuple[tuple[Any, str], ...]
    names: tuple[str, ...]


def forward_units(teacher: CosmosModel) -> list[ForwardUnit]:
    """In the order of a forward pass: of each tower what is around its blocks, then its blocks."""
    names = {id(parameter): name for name, parameter in teacher.named_parameters()}
    visual, pooler = teacher.visual, teacher.visual.attn_cross_pool
    inside = {id(p) for module in (visual.transformer, pooler) if module is not None for p in module.parameters()}
    of_images: list[Tensor] = [p for p in visual.parameters() if id(p) not in inside]
    of_texts: list[Tensor] = [teacher.token_embedding.weight, teacher.positional_embedding, teacher.text_projection]
    of_texts += list(teacher.ln_final.parameters())
    towers: tuple[tuple[Sequence[Tensor], tuple[tuple[Any, str], ...], Any], ...] = (
        (of_images, ((visual, "forward"), (visual, "forward_dense")), visual.transformer),
        (of_texts, ((teacher, "run_text"),), teacher.transformer),
    )
    found = []
    for around, calls, tower in towers:
        found.append(ForwardUnit(calls, tuple(names[id(p)] for p in around)))
        for block in tower.blocks:
            methods = tuple((block, name) for name in ("forward", "forward_kept", "forward_csa"))
            found.append(ForwardUnit(methods, tuple(names[id(p)] for p in block.parameters())))
    return found
