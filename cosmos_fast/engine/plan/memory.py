"""What one rank keeps, in bytes.

Weights, gradients, optimizer and teacher are fp32 in every precision: bf16 and fp16 are autocast, which keeps a 16-bit
copy of the weights from forward to backward. Bytes for each of P parameters on W ranks:

    stage    weights   masters   gradients   AdamW   teacher   its whole copy
    0           4         -          4         8        4            -
    1           4        4/W      4 + 4/W     8/W      4/W           4
    2           4        4/W        8/W       8/W      4/W           4
    3        4 + 4/W     4/W        8/W       8/W      4/W           4

With run.teacher_copy=parts there are two units of its copy at a time, of a block or of what is around the blocks. Plain
CLIP has the average too, for its checkpoints and evaluations, and the same copy. Stage 3 gathers the weights and, of a
model below a thousand million parameters, keeps them until the backward pass is through; of a larger one it has a few
blocks at a time. From stage 1 on, gradients are brought together in buckets first; the optimizer is given a copy of a
rank's part. With offload_optimizer what it works on lies in the host's memory: masters, AdamW's state, its gradients
and the teacher, but not the copy that the teacher's passes run on.
"""

from __future__ import annotations

from cosmos_fast.config import TrainConfig
from cosmos_fast.config.deepspeed import offloads_optimizer
from cosmos_fast.engine.estimate import activation_values, remade_values
from cosmos_fast.engine.plan.layout import Layout
from cosmos_fast.engine.plan.traffic import REUSED_VALUES, bucket_values, teacher_units, term_views

# Batches on the GPU at least: the one at work, and the one on its way. A step begins when all of its micro-batches are
# there: where their losses share the negatives, their images are needed twice.
_BATCHES = 2


def memory_bytes(config: TrainConfig, parameters: int, layout: Layout) -> dict[str, int]:
    """By what it is for; without the reserve that the plan assumes."""
    return {**state_bytes(config, parameters, layout), **batch_bytes(config, layout)}


def state_bytes(config: TrainConfig, parameters: int, layout: Layout) -> dict[str, int]:
    """What does not depend on the batch."""
    stage, whole = layout.stage, 4 * parameters
    own = 4 * -(-parameters // layout.ranks) if stage >= 1 else whole  # of what the optimizer works on
    gradients = {0: whole, 1: whole + own}.get(stage, 2 * own)
    buckets = 4 * min(bucket_values(config), parameters) if stage >= 1 else 0
    casts = 2 * parameters if layout.value_bytes == 2 else 0
    copied = 4 * _teacher_in_parts(config) if config.run.teacher_copy == "parts" else whole
    gathered = whole if stage == 3 and parameters < REUSED_VALUES else 0
    found = {
        "weights": (own + gathered if stage == 3 else whole) + casts,
        "masters": own if stage >= 1 else 0,
        "gradients": gradients + buckets,
        "optimizer": 2 * own,
        "teacher": own + (copied if stage >= 1 else 0),
    }
    moved = host_bytes(config, parameters, layout)
    return {name: size - moved.get(name, 0) for name, size in found.items()}


def host_bytes(config: TrainConfig, parameters: int, layout: Layout) -> dict[str, int]:
    """What lies in the host's memory instead; empty without offload_optimizer. Stage 0 does not know it."""
    if layout.stage == 0 or not offloads_optimizer(config):
        return {}
    own = 4 * -(-parameters // layout.ranks)
    return {"masters": own, "gradients": own, "optimizer": 2 * own, "teacher": own}


def _teacher_in_parts(config: TrainConfig) -> int:
    """Parameters gathered at a time: a tower's own, its block at work, and the next on its way."""
    units = teacher_units(config.model)
    second = config.model.vision.layers + 1  # where the text tower begins
    towers = (units[:second], units[second:])
    return max(around + 2 * max(blocks) for around, *blocks in towers)


def batch_bytes(config: TrainConfig, layout: Layout) -> dict[str, int]:
    """What grows with the batch: activations of one micro-batch, the losses' tensors, all images of a step."""
    model, views, recompute = config.model, config.data.views, config.compute.checkpoint_activations
    kept = activation_values(model, views, recompute) + remade_values(model, views, recompute)
    side, local = model.vision.image_size, views.local_image_size
    pixels = 3 * (views.global_crops * side**2 + views.local_crops * local**2)
    return {
        "activations": layout.batch_size * kept * layout.value_bytes,
        "loss": loss_bytes(config, layout),
        "input": max(_BATCHES, layout.accumulate_steps) * layout.batch_size * pixels * layout.value_bytes,
    }


def loss_bytes(config: TrainConfig, layout: Layout) -> int:
    """Of one loss: gathered columns, column log-sum-exps and their sums, gradients of the columns and their parts."""
    views, dim, samples = config.data.views, config.model.embed_dim, layout.loss_batch
    terms = term_views(config)
    gathered, pairs = sum(columns for _, columns in terms), sum(rows * columns for rows, columns in terms)
    columns = terms[0][1]  # those with a gradient
    own_views = 2 * (views.image_views + views.text_views)  # features and their gradients of this rank's samples
    own = own_views * layout.batch_size * (layout.accumulate_steps if layout.all_negatives else 1) * dim * 4 * 2
    return samples * (gathered * dim * layout.value_bytes + 3 * 4 * pairs + 2 * 4 * columns * dim) + own
