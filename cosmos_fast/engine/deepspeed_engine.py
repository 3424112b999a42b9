"""The one place that knows DeepSpeed: ZeRO behind the trainer's optimizer and the student's passes.

To DeepSpeed the run is fp32 whatever run.precision says, because here precision is autocast: weights, masters and
gradients are fp32 in every stage, clipping and the loss scale act in our optimizer, and a step that is not finite is
skipped by all ranks. Gradients of a rank are its share of the global batch's; DeepSpeed takes their mean, which the
optimizer multiplies by the number of ranks.

    stage 0   every rank holds everything; gradients are averaged
    stage 1   masters, moments and teacher divided; weights whole
    stage 2   gradients divided as well
    stage 3   weights too: gathered module by module in the forward, all of them in the backward

The teacher's forward runs on a copy of it (stages 1 to 3; `engine.teacher_copy`).

Axes: W ranks, S elements of a rank's part of one flat buffer.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosmos_fast.config import TrainConfig
from cosmos_fast.config.deepspeed import deepspeed_json
from cosmos_fast.engine.communication import time_collectives
from cosmos_fast.engine.optimizer import StepResult
from cosmos_fast.engine.precision import Precision
from cosmos_fast.engine.student_passes import StudentPasses, features_of
from cosmos_fast.engine.teacher_copy import TeacherCopy, TeacherInParts, WholeTeacher, choose_copy, has_teacher_pass
from cosmos_fast.engine.zero_layout import FlatLayout
from cosmos_fast.engine.zero_optimizer import STATES, ZeroAdamWEma
from cosmos_fast.engine.zero_state import common_steps, slices_of_parts, slices_of_whole, step_slices
from cosmos_fast.model import CosmosFeatures, CosmosModel
from cosmos_fast.model.stored import TensorSlice
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.network import limit_waits
from cosmos_fast.utils.phases import PhaseClock, no_clock
from cosmos_fast.utils.ranks import Ranks


class ZeroRun:
    """Optimizer, passes and state of a run that DeepSpeed divides over ranks.

    student, teacher: whole, with the weights to start from; of the student, stage 3 leaves a part on each rank.
    optimizer_state: of a checkpoint; of stored tensors only what this rank holds is read. clock: told of collectives.

    Every method is called by all ranks together.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: CosmosModel,
        teacher: CosmosModel,
        precision: Precision,
        ranks: Ranks,
        optimizer_state: Mapping[str, Tensor] | None = None,
        clock: PhaseClock = no_clock,
    ) -> None:
        if not dist.is_initialized():
            raise UserError(
                "run.engine=deepspeed works where `train` has started its processes: to measure with --profile or "
                "--find-batch-size, set run.engine=plain"
            )
        self._clock = clock
        settings = deepspeed_json(config)
        self.stage: int = settings["zero_optimization"]["stage"]
        self._student, self._ranks = student, ranks
        self._teacher = dict(teacher.named_parameters())
        self._names = [name for name, _ in student.named_parameters()]
        self._shapes = {name: tuple(p.shape) for name, p in student.named_parameters()}
        self._adamw = ZeroAdamWEma(config.optimizer, student)
        self._deepspeed = import_deepspeed(student.logit_scale.device)
        self._engine = self._initialize(StudentPasses(student, precision), settings)
        limit_waits(config.run.collective_timeout_s)  # DeepSpeed has made groups that wait as long as torch likes
        self._flats = [] if self.stage == 0 else self._find_flats()
        if self.stage:
            self._adamw.norm_of = lambda: self._engine.optimizer._global_grad_norm
        self._start_state(optimizer_state)
        self._teacher_copy = self._divided_teacher(config, teacher)

    @property
    def described(self) -> str:
        """In a few words."""
        return f"DeepSpeed ZeRO stage {self.stage}" + (
            ", teacher gathered in parts" if isinstance(self._teacher_copy, TeacherInParts) else ""
        )

    # the student's passes

    def forward(self, images: list[Tensor], texts_VBL: Tensor) -> CosmosFeatures:
        """As the student itself."""
        return features_of(self._engine(images, texts_VBL))

    def backward(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor] | None = None, *, last: bool = True
    ) -> None:
        """DeepSpeed takes scalars: one whose gradient by each tensor is the gradient given."""
        given = [None] * len(tensors) if gradients is None else gradients
        parts = [x if g is None else (x * g).sum() for x, g in zip(tensors, given, strict=True)]
        self._engine.set_gradient_accumulation_boundary(last)
        if self.stage == 3:
            self._gather_student()
        self._engine.backward(torch.stack(parts).sum(), scale_wrt_gas=False)

    def _gather_student(self) -> None:
        """Stage 3 gathers a module's weights for its backward by hooks on the tensors that it returns. The model and
        its towers return more than tensors, and use weights of their own: these hooks would miss them."""
        every: list[Any] = list(self._student.parameters())
        parted = [p for p in every if p.ds_status.name == "NOT_AVAILABLE"]
        if parted:
            parted[0].all_gather(parted)

    # the optimizer

    def zero_grad(self) -> None:
        """Drop the gradients of a step that was given up."""
        self._engine.optimizer.zero_grad()

    def gradient_norms(self) -> dict[str, float]:
        """Nothing: no rank has whole gradients."""
        return {}

    def step(self, *, lr: float, ema_decay: float, loss: Tensor | None = None, loss_scale: float = 1.0) -> StepResult:
        """As AdamWEma.step(); `loss` is the same on all ranks."""
        loss_finite = loss is None or bool(torch.isfinite(loss))
        mean_scale = loss_scale / self._ranks.world_size  # after the backward pass, where fp16 could overflow by it
        self._adamw.prepare(lr=lr, ema_decay=ema_decay, loss_scale=mean_scale, loss_finite=loss_finite)
        self._engine.step()
        result = self._adamw.result
        if result is None:  # DeepSpeed found a gradient that is not finite, and the step did not come to the optimizer
            return StepResult(float("inf"), applied=False, loss_finite=loss_finite)
        if result.applied:
            self._teacher_copy.refresh()
        return result

    @contextmanager
    def whole_models(self) -> Iterator[None]:
        """In the block student and teacher are whole on every rank."""
        with self.whole_student(), self._teacher_copy.whole():
            yield

    def whole_student(self, names: Sequence[str] | None = None) -> AbstractContextManager[object]:
        """In the block the student's parameters, or those named, are whole on every rank."""
        if self.stage < 3:
            return nullcontext()
        chosen = [p for name, p in self._student.named_parameters() if names is None or name in names]
        return self._deepspeed.zero.GatheredParameters(chosen)

    # the state

    def slices(self, *, copy: bool) -> dict[str, TensorSlice]:
        """What this rank gives to a checkpoint: of student, teacher and optimizer the elements that it stores, on the
        CPU. copy: they stay as they are while the run goes on."""
        rank, count = self._ranks.rank, self._ranks.world_size
        found = slices_of_parts(self._flats, self._of, rank, copy=copy)
        if self.stage == 0:
            found = slices_of_whole(dict(self._student.named_parameters()), self._of, rank, count, copy=copy)
        return found | (step_slices(self._names, self._adamw.steps) if self._ranks.first else {})

    def _of(self, master: Tensor, state: str) -> Tensor:
        return master.detach() if state == "master" else self._adamw.state[master][state]

    def _start_state(self, stored: Mapping[str, Tensor] | None) -> None:
        if stored is not None:
            self._adamw.steps = common_steps(stored, self._names)
        if self.stage == 0:
            for name, p in self._student.named_parameters():
                moments = None if stored is None else {s: stored[f"{s}/{name}"].to(p).clone() for s in STATES}
                self._adamw.start_state(p, self._teacher[name].data, moments)
        rank = self._ranks.rank
        for master, layout in self._flats:
            teacher, moments = layout.part(self._teacher, rank, master.data), None
            if stored is not None:
                moments = {s: layout.part(stored, rank, master.data, f"{s}/") for s in STATES}
            self._adamw.start_state(master, teacher, moments)

    def _divided_teacher(self, config: TrainConfig, teacher: CosmosModel) -> TeacherCopy:
        """What the teacher's forward pass runs on; in stage 0 there are no flats, and it is the average itself."""
        weights_bytes = sum(4 * p.numel() for p in self._teacher.values())
        if choose_copy(config, self.stage, weights_bytes, self._ranks) == "parts":
            return TeacherInParts(teacher, self._averages, self._ranks, self._clock)
        return WholeTeacher(teacher, self._averages, self._gather, runs=has_teacher_pass(config))

    def _averages(self) -> list[tuple[Tensor, FlatLayout]]:
        """This rank's parts of the teacher."""
        return [(self._of(master, "teacher").detach(), layout) for master, layout in self._flats]

    def _gather(self, part_S: Tensor) -> Tensor:
        """[S] of each rank -> [W, S], on the device of the ranks' collectives."""
        own = part_S.detach().to(self._ranks.device).contiguous()
        if self._ranks.group is None:
            return own.unsqueeze(0)
        parts = own.new_empty(self._ranks.world_size * len(own))
        with self._clock("communication"):
            dist.all_gather_into_tensor(parts, own, group=self._ranks.group)
        return parts.view(self._ranks.world_size, -1)

    # DeepSpeed

    def _initialize(self, model: nn.Module, settings: dict[str, Any]) -> Any:
        # DeepSpeed takes this for the number of the GPU, which it is not where each process sees its own GPU only.
        device = self._student.logit_scale.device
        os.environ["LOCAL_RANK"] = str(self._ranks.local_rank if device.index is None else device.index)
        try:
            with self._equal_weights(), self._scalars_as_vectors():
                engine, *_ = self._deepspeed.initialize(
                    model=model, optimizer=self._adamw, config=settings, dist_init_required=False
                )
        except (ValueError, AssertionError) as error:  # pydantic's errors are ValueErrors
            detail = " ".join(str(error).split())
            raise UserError(
                f"DeepSpeed refuses its configuration ({detail}): change the keys under `deepspeed`"
            ) from None
        time_collectives(self._deepspeed.comm.comm.cdb, self._clock)
        return engine

    @contextmanager
    def _equal_weights(self) -> Iterator[None]:
        """Rank 0's weights for all. DeepSpeed's own broadcast, which is off in the block, cannot send a scalar."""
        if self._ranks.group is not None:
            for parameter in (*self._student.parameters(), *self._teacher.values()):
                dist.broadcast(parameter.data, 0, group=self._ranks.group)
        engine_type = self._deepspeed.DeepSpeedEngine
        broadcast, engine_type._broadcast_model = engine_type._broadcast_model, lambda engine: None
        try:
            yield
        finally:
            engine_type._broadcast_model = broadcast

    @contextmanager
    def _scalars_as_vectors(self) -> Iterator[None]:
        """Stage 3 cannot send scalars either, and remembers shapes: here they have one axis, afterwards none."""
        scalars = [p for p in self._student.parameters() if p.ndim == 0] if self.stage == 3 else []
        for parameter in scalars:
            parameter.data = parameter.data.view(1)
        yield
        for parameter in scalars:
            parameter.ds_shape = torch.Size([])  # type: ignore[attr-defined]

    def _find_flats(self) -> list[tuple[Tensor, FlatLayout]]:
        """This rank's fp32 masters, and what lies where in them."""
        zero, names = self._engine.optimizer, {id(p): name for name, p in self._student.named_parameters()}
        whole_groups = self.stage < 3
        masters = zero.single_partition_of_fp32_groups if whole_groups else zero.fp32_partitioned_groups_flat
        groups = zero.round_robin_bit16_groups if whole_groups else zero.fp16_groups
        found = []
        for master, group in zip(masters, groups, strict=True):
            own = [names[id(p)] for p in group]
            shares = None if whole_groups else [p.partition_numel() for p in group]
            found.append((master, FlatLayout.of(own, [self._shapes[name] for name in own], shares)))
        return found


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, for this kind of device.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"run.engine=deepspeed, which training on several ranks needs, but DeepSpeed cannot be imported ({error}): "
            "pip install 'cosmos-fast[deepspeed]'"
        ) from None
    # What it warns of is known: an optimizer that it has not tried, modules that return more than tensors.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Collectives through shared memory, which DeepSpeed would compile for a minute, with a compiler that may not exist.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
