"""State dicts by the original's names: tell what is missing, and read an architecture off the shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cosmos_fast.config import ModelConfig, TextConfig, VisionConfig
from cosmos_fast.utils.errors import UserError

DESCRIPTION = "open_clip_config.json"  # beside weights, as OpenCLIP publishes them
HEADS_OF_WIDTH = 64  # CLIP's head width wherever a checkpoint does not say
# What COSMOS has beyond CLIP, for its training: no feature of an image or a caption needs it.
CROSSMODAL = (
    *("image_token_mapping.", "text_token_mapping.", "visual.attn_cross_pool.", "text_attn_cross_pool."),
    "distill_logit_scale",
)
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # among the weights of its programs
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
# Vision widths of OpenCLIP's ViT-H, g and bigG, whose heads are wider.
OTHER_HEADS = (1280, 1408, 1664)


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the `module.` and `_orig_mod.` that data-parallel wrappers and torch.compile put in front.

    Raises:
        UserError: a name that is there twice.
    """
    stripped: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for name, tensor in state_dict.items():
        bare = _PREFIXES.sub("", name)
        if bare in stripped:
            both = sorted((first[bare], name), key=len)
            raise UserError(f"weights hold both {both[0]} and {both[1]}: keep one of them")
        stripped[bare], first[bare] = tensor, name
    return stripped


def check_stored(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Whether a model of these weights may take its memory: they are plain tensors of numbers that share no elements,
    about as many as the architecture needs.

    Raises:
        UserError: they are something else.
    """
    stored: dict[int, int] = {}
    for name, tensor in state_dict.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
            raise UserError(f"{name} is no plain tensor of floating-point numbers ({tensor.dtype}, {tensor.layout})")
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
    if sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values()) > sum(stored.values()):
        raise UserError("tensors share their elements, which weights do not: it is damaged")
    needed, given = _elements(config), sum(tensor.numel() for tensor in state_dict.values())
    if needed > 4 * given:  # what differs by less is told by name
        raise UserError(f"it describes a model of {needed:,} weights, and holds {given:,}")


def _elements(config: ModelConfig) -> int:
    """How many weights an architecture has, without biases and norms."""
    vision, text, dim = config.vision, config.text, config.embed_dim
    blocks = 12 * (vision.layers * vision.width**2 + text.layers * text.width**2)
    patches = 3 * vision.patch_size**2 + (vision.image_size // vision.patch_size) ** 2
    tokens = text.vocab_size + text.context_length
    heads = dim * (vision.width + text.width) + 8 * dim**2 if config.crossmodal else 0
    return blocks + (patches + dim) * vision.width + (tokens + dim) * text.width + heads


def check_state_dict(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise a UserError that names what is missing, unknown or of another shape."""
    problems = []
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    misshapen = [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    for label, names in (("missing", missing), ("unknown", unknown), ("wrong shape", misshapen)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            problems.append(f"{label}: {', '.join(names[:4])}{more}")
    if problems:
        raise UserError(f"weights do not fit this architecture ({'; '.join(problems)})")


def infer_config(state_dict: Mapping[str, Tensor], described: ModelConfig | None = None) -> ModelConfig:
    """The architecture that a state dict under the original's names belongs to.

    Shapes tell everything but the number of heads, which `described` tells; without it CLIP's 64 channels a head are
    assumed, as in all released weights.

    Raises:
        UserError: the tensors are not those of a CLIP or COSMOS model, or of the described one, or of one whose heads
            are known to be of another width.
    """
    needed = ("visual.conv1.weight", "visual.positional_embedding", "positional_embedding", "token_embedding.weight",
              "text_projection")  # fmt: skip
    absent = [name for name in needed if name not in state_dict]
    if absent:
        raise UserError(f"not the weights of a CLIP or COSMOS model: {', '.join(absent)} missing")
    misshapen = [name for name in needed if state_dict[name].dim() != (4 if "conv1" in name else 2)]
    if misshapen:
        shapes = ", ".join(f"{name} is {tuple(state_dict[name].shape)}" for name in misshapen)
        raise UserError(f"not the weights of a CLIP or COSMOS model: {shapes}")
    conv, positions = state_dict["visual.conv1.weight"], state_dict["visual.positional_embedding"]
    width, _, patch, _ = conv.shape
    grid = round((positions.shape[0] - 1) ** 0.5)
    context, text_width = state_dict["positional_embedding"].shape
    if described is None and width in OTHER_HEADS:
        raise UserError(
            f"a vision tower of width {width} has heads of another width than {HEADS_OF_WIDTH} in OpenCLIP, and "
            f"nothing here says which: put its {DESCRIPTION} beside the file"
        )
    found = ModelConfig(
        embed_dim=state_dict["text_projection"].shape[1],
        vision=VisionConfig(
            image_size=grid * patch,
            patch_size=patch,
            width=width,
            layers=_count_blocks(state_dict, r"visual\.transformer\.resblocks\.(\d+)\."),
            head_width=described.vision.head_width if described else HEADS_OF_WIDTH,
        ),
        text=TextConfig(
            context_length=context,
            vocab_size=state_dict["token_embedding.weight"].shape[0],
            width=text_width,
            heads=described.text.heads if described else max(1, text_width // HEADS_OF_WIDTH),
            layers=_count_blocks(state_dict, r"transformer\.resblocks\.(\d+)\."),
        ),
        crossmodal="image_token_mapping.weight" in state_dict,
    )
    if described and replace(found, crossmodal=False) != replace(described, crossmodal=False):
        raise UserError(f"{DESCRIPTION} beside it describes another model: mend it, or move the weights elsewhere")
    return found


def _count_blocks(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    numbers = {int(match.group(1)) for name in state_dict if (match := re.match(pattern, name))}
    return len(numbers)
