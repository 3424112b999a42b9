"""What the ranks of a run send each other in one optimizer step.

Every collective is told by its full tensor of N bytes, the one that all ranks end up with or add up. Of it, one of W
ranks receives (and sends) in a ring:

    all-gather, all-to-all, reduce-scatter    N (W - 1) / W
    all-reduce                              2 N (W - 1) / W
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from cosmos_fast.config import ModelConfig, TrainConfig
from cosmos_fast.config.deepspeed import deepspeed_json
from cosmos_fast.engine.plan.layout import Layout
from cosmos_fast.engine.teacher_copy import forward_units, has_teacher_pass
from cosmos_fast.model import create_model

Kind = Literal["all_gather", "all_reduce", "all_to_all", "reduce_scatter"]

# DeepSpeed's default: a model below so many numbers keeps the parameters that stage 3 has gathered for the forward pass
# until the backward pass is through.
REUSED_VALUES = 1_000_000_000
# The optimizer's groups, a flat buffer each: with weight decay, without, scales of the losses.
GROUPS = 3
_DEFAULT_BUCKET = 500_000_000  # DeepSpeed's, which "auto" stands for
_STATE_BYTES = 4  # weights, gradients and teacher are fp32
# Of the original's loss: both sides of each of its 80 pairs of views anew; of plain CLIP's, images and texts.
_ORIGINAL_GATHERS = {"cosmos": 160, "clip": 2}


@dataclass(frozen=True)
class Transfer:
    """Calls of one collective in an optimizer step.

    full_bytes: of their full tensors together. beside: phase of computing that it may run beside, or "".
    """

    purpose: str
    kind: Kind
    calls: int
    full_bytes: int
    beside: Literal["teacher", "student", "backward", ""] = ""

    def received_bytes(self, ranks: int) -> float:
        """What one rank receives of it in a ring, which is as much as it sends."""
        return self.full_bytes * (ranks - 1) / ranks * (2 if self.kind == "all_reduce" else 1)


def received_bytes(transfers: Sequence[Transfer], ranks: int) -> float:
    """Of one rank, in all of them."""
    return sum(one.received_bytes(ranks) for one in transfers)


def loss_transfers(config: TrainConfig, layout: Layout) -> list[Transfer]:
    """Of all losses of a step: see `cosmos_fast.ops.infonce_ranks`.

    Features travel in 16 bits, in an fp32 run in 24 and a factor a row; log-sum-exps and the columns' gradient in fp32.
    The log-sum-exps of all terms are merged together: each rank adds up its own columns', then tells all.
    """
    if layout.ranks == 1:
        return []
    dim = config.model.embed_dim
    samples, calls = layout.loss_batch * layout.losses, layout.losses
    feature = (3 * dim + 4 if layout.value_bytes == 4 else 2 * dim) * samples
    terms = term_views(config)
    pairs = 4 * sum(rows * columns for rows, columns in terms) * samples
    sums = 4 * len(terms) * layout.ranks * calls
    (_, columns), *distill = terms
    found = [Transfer("loss: student's columns", "all_gather", calls, columns * feature)]
    found += [
        Transfer("loss: teacher's views", "all_gather", calls, teacher_views * feature, "student")
        for _, teacher_views in distill
    ]
    return [
        *found,
        Transfer("loss: log-sum-exps, merging", "all_to_all", calls, pairs + sums),
        Transfer("loss: log-sum-exps, merged", "all_gather", calls, pairs),
        Transfer("loss: gradient of the columns", "reduce_scatter", calls, columns * 4 * dim * samples),
    ]


def term_views(config: TrainConfig) -> list[tuple[int, int]]:
    """(views of the rows, views of the columns) of each term of the loss; the columns are what ranks exchange."""
    views = config.data.views
    if config.objective == "clip":
        rows, columns = sorted((views.image_views, views.text_views), reverse=True)
        return [(rows, columns)]
    teacher_views = views.global_crops + views.global_captions
    return [(views.text_views, views.global_crops), (views.image_views + views.text_views, teacher_views)]


def original_gathers(config: TrainConfig, layout: Layout) -> int:
    """Collectives of the original's losses in a step."""
    return _ORIGINAL_GATHERS[config.objective] * layout.losses


def original_loss_bytes(config: TrainConfig, layout: Layout) -> float:
    """What a rank receives where each pair of views gathers both of its sides anew, in fp32."""
    full = original_gathers(config, layout) * 4 * config.model.embed_dim * layout.loss_batch
    return full * (layout.ranks - 1) / layout.ranks


def bucket_values(config: TrainConfig) -> int:
    """Gradients that are added up in one collective."""
    values = deepspeed_json(config)["zero_optimization"]["reduce_bucket_size"]
    return _DEFAULT_BUCKET if values == "auto" else int(values)


def state_transfers(config: TrainConfig, parameters: int, layout: Layout) -> list[Transfer]:
    """Of gradients, weights and teacher, as DeepSpeed's stages do it."""
    if layout.ranks == 1:
        return []
    size, micro = _STATE_BYTES * parameters, layout.accumulate_steps
    buckets = -(-parameters // bucket_values(config))
    # Stage 2 and 3 keep their own part of the gradients only, so each micro-batch has to be added up by itself.
    rounds = micro if layout.stage >= 2 else 1
    # DeepSpeed adds up whole buckets on every rank in the stages 1 and 2 too, each rank keeps its part.
    kind: Kind = "reduce_scatter" if layout.stage == 3 else "all_reduce"
    narrow = deepspeed_json(config).get("communication_data_type", "fp32") != "fp32"
    found = [Transfer("gradients", kind, rounds * buckets, rounds * size // (2 if narrow else 1), "backward")]
    if layout.stage in (1, 2):
        found.append(Transfer("weights after the step", "all_gather", GROUPS, size))
    elif layout.stage == 3:
        passes = (1 if parameters < REUSED_VALUES else 2) * micro
        passes += micro - 1 if layout.all_negatives else 0
        blocks = config.model.vision.layers + config.model.text.layers
        found.append(Transfer("weights, block by block", "all_gather", passes * blocks, passes * size, "student"))
        found.append(Transfer("embeddings after the step", "all_gather", 1, _STATE_BYTES * _kept_whole(config.model)))
    if layout.stage >= 1 and has_teacher_pass(config):
        found.append(_teacher_transfer(config, size, micro))
    return found


def _teacher_transfer(config: TrainConfig, size: int, micro: int) -> Transfer:
    """Of the whole teacher once a step, or block by block for each micro-batch; "auto" counts as whole."""
    if config.run.teacher_copy != "parts":
        return Transfer("teacher after the step", "all_gather", GROUPS, size)
    units = teacher_units(config.model)
    return Transfer(
        "teacher, block by block", "all_gather", micro * len(units), micro * _STATE_BYTES * sum(units), "teacher"
    )


@cache
def teacher_units(model: ModelConfig) -> tuple[int, ...]:
    """Parameters that a teacher in parts gathers together, in the order of its forward pass."""
    with torch.device("meta"):
        made = create_model(model)
    sizes = {name: parameter.numel() for name, parameter in made.named_parameters()}
    return tuple(sum(sizes[name] for name in unit.names) for unit in forward_units(made))


@cache
def _kept_whole(model: ModelConfig) -> int:
    """Parameters that stage 3 keeps gathered from step to step: those that the towers use without calling a module."""
    with torch.device("meta"):
        made = create_model(model)
    kept = [*made.parameters(recurse=False), *made.visual.parameters(recurse=False), made.visual.conv1.weight]
    return sum(parameter.numel() for parameter in kept)
