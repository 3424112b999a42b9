"""What a run is made of: student and teacher, and the optimizer that divides its work among ranks or does not."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from cosmos_fast.config import TrainConfig
from cosmos_fast.config.deepspeed import offloads_optimizer, zero_stage
from cosmos_fast.engine.checkpoint import Snapshot
from cosmos_fast.engine.initial import start_from
from cosmos_fast.engine.optimizer import AdamWEma, build_optimizer
from cosmos_fast.engine.precision import Precision
from cosmos_fast.engine.rng import set_rng_state
from cosmos_fast.engine.teacher_copy import check_copy
from cosmos_fast.model import CosmosModel, create_model
from cosmos_fast.model.compute import apply_compute
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.phases import PhaseClock, no_clock
from cosmos_fast.utils.ranks import Ranks

if TYPE_CHECKING:
    from cosmos_fast.engine.deepspeed_engine import ZeroRun


def build_models(config: TrainConfig, device: torch.device) -> tuple[CosmosModel, CosmosModel]:
    """Student and teacher of equal weights, decided by the seed, the same on every rank."""
    torch.manual_seed(config.seed)
    student = create_model(config.model).to(device).train()
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    for model in (student, teacher):
        apply_compute(model, config.compute, device)
    return student, teacher


def build_updates(
    config: TrainConfig,
    student: CosmosModel,
    teacher: CosmosModel,
    precision: Precision,
    ranks: Ranks,
    stored: Snapshot | None,
    clock: PhaseClock = no_clock,
) -> AdamWEma | ZeroRun:
    """The optimizer, and with `stored` the weights, the optimizer's state and the generators of a checkpoint."""
    if stored is None:
        start_from(config, student, teacher)
    else:
        student.load_reference_state_dict(stored.student)
        teacher.load_reference_state_dict(stored.teacher)
    found: AdamWEma | ZeroRun
    if divides_work(config, ranks):
        from cosmos_fast.engine.deepspeed_engine import ZeroRun

        state = None if stored is None else stored.optimizer
        found = ZeroRun(config, student, teacher, precision, ranks, state, clock)
    else:
        found = build_optimizer(config, student, teacher)
        if stored is not None:
            found.load_state_dict(dict(stored.optimizer))
    if stored is not None:
        set_rng_state(stored.rng)
    return found


def divides_work(config: TrainConfig, ranks: Ranks) -> bool:
    """Whether DeepSpeed stands between the trainer and its weights.

    Raises:
        UserError: several ranks without it, or what `check_division` refuses.
    """
    if config.run.engine == "plain" and ranks.world_size > 1:
        raise UserError(f"run.engine=plain trains on one rank, and there are {ranks.world_size}: set run.engine=auto")
    if config.run.engine == "deepspeed" or ranks.world_size > 1:
        check_division(config, zero_stage(config))
        return True
    return False


def check_division(config: TrainConfig, stage: int) -> None:
    """UserError for what DeepSpeed's way of holding weights in this ZeRO stage leaves no room for."""
    compute = config.compute
    if compute.optimizer != "fused":
        raise UserError(
            f"compute.optimizer={compute.optimizer} is for one process: under DeepSpeed set compute.optimizer=fused"
        )
    moving = [name for name in ("compile", "cuda_graphs") if getattr(compute, name)]
    moving += ["linear=fp8"] if compute.linear == "fp8" else []
    if stage == 3 and moving:
        raise UserError(
            f"compute.{moving[0]} needs weights that stay where they are, and ZeRO stage 3 moves them: turn it off, or "
            "set deepspeed.zero_optimization.stage=2"
        )
    if stage == 0 and offloads_optimizer(config):
        raise UserError(
            "deepspeed.zero_optimization.offload_optimizer.device=cpu, but ZeRO stage 0 offloads nothing: set "
            "deepspeed.zero_optimization.stage to 1, 2 or 3, or the device to none"
        )
    check_copy(config, stage)
