"""How many images a forward takes in an evaluation."""

from __future__ import annotations

import torch

from cosmos_fast.evaluate.encoder import Model
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.ranks import ONE, Ranks

CPU_BATCH = 32
# Enough to fill a large GPU. A batch is also what ranks divide a set by: with more, many of them would have no work.
GPU_BATCH = 256


def fitting_batch(model: Model, ranks: Ranks = ONE) -> int:
    """Images a forward, the same on every rank, which all call this.

    On a CPU a fixed number; on GPUs the largest of GPU_BATCH, its half, ... that fits every one of them, found by
    trial. UserError where not even one image fits.
    """
    device = next(model.parameters()).device
    with ranks.together():
        size = CPU_BATCH if device.type == "cpu" else _fits_by_trial(model, device)
    return int(ranks.spread({"batch": size})["batch"][0])


@torch.inference_mode()
def _fits_by_trial(model: Model, device: torch.device) -> int:
    side, size = model.config.vision.image_size, GPU_BATCH
    while size:
        try:
            # One batch in the model, and the pixels of the next.
            pixels_2B3SS = torch.zeros(2, size, 3, side, side, device=device)
            model.encode_image(pixels_2B3SS[0])
            return size
        except torch.OutOfMemoryError:
            size //= 2
        torch.cuda.empty_cache()  # outside of the handler, which still holds the frames that hold the tensors
    raise UserError(f"the memory of {device} does not hold the model and one image: use --device cpu")
