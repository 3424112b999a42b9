"""A folder for transformers: `CLIPModel.from_pretrained(FOLDER)`, and CLIPProcessor where the vocabulary is CLIP's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cosmos_fast.config import ModelConfig
from cosmos_fast.data.images import MEAN, STD
from cosmos_fast.data.tokenizer import END_ID, START_ID, VOCAB_SIZE, byte_letters, read_merges
from cosmos_fast.exchange.source import Source
from cosmos_fast.exchange.towers import tower_weights

START, END = "<|startoftext|>", "<|endoftext|>"
_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def write(source: Source, folder: Path) -> None:
    """Weights, configuration, image preparation, and CLIP's vocabulary if it is the model's."""
    (model,) = source.models.values()
    weights, config = tower_weights(model)
    save_file(renamed(weights), folder / "model.safetensors", {"format": "pt"})
    documents = {
        "config.json": _model_config(config, float(weights["logit_scale"])),
        "preprocessor_config.json": _preprocessor(config.vision.image_size),
    }
    if config.text.vocab_size >= VOCAB_SIZE:  # CLIP's, maybe padded
        documents["vocab.json"] = _vocabulary()
        documents["tokenizer_config.json"] = _tokenizer(config.text.context_length)
        merges = "".join(f"{left} {right}\n" for left, right in read_merges())
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of plain CLIP under the names of transformers' CLIPModel: queries, keys and values apart, projections
    transposed."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", name)
        if name in _NAMES:
            found[_NAMES[name]] = tensor
        elif name in _PROJECTIONS:
            found[_PROJECTIONS[name]] = tensor.T.contiguous()
        elif stem in _NAMES:
            found[f"{_NAMES[stem]}.{kind}"] = tensor
        else:
            assert block is not None, name
            tower, part = "vision_model" if block[1] else "text_model", block[3]
            found |= _of_block(f"{tower}.encoder.layers.{block[2]}", part, tensor)
    return found


def _of_block(layer: str, part: str, tensor: Tensor) -> dict[str, Tensor]:
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}.self_attn.{letter}_proj.{kind}": third.clone() for letter, third in parts}
    stem, _, kind = part.rpartition(".")
    return {f"{layer}.{_IN_BLOCK[stem]}.{kind}": tensor}


def _model_config(config: ModelConfig, log_scale: float) -> dict[str, Any]:
    vision, text = config.vision, config.text
    start, end = (START_ID, END_ID) if text.vocab_size >= VOCAB_SIZE else (text.vocab_size - 2, text.vocab_size - 1)
    shared = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": config.embed_dim}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": log_scale,
        "vision_config": {
            **{"model_type": "clip_vision_model", "hidden_size": vision.width, "intermediate_size": 4 * vision.width},
            **{"num_hidden_layers": vision.layers, "num_attention_heads": vision.heads},
            **{"image_size": vision.image_size, "patch_size": vision.patch_size},
            **shared,
        },
        "text_config": {
            **{"model_type": "clip_text_model", "hidden_size": text.width, "intermediate_size": 4 * text.width},
            **{"num_hidden_layers": text.layers, "num_attention_heads": text.heads},
            **{"vocab_size": text.vocab_size, "max_position_embeddings": text.context_length},
            # Features are read at the first end token: what follows it is padding.
            **{"bos_token_id": start, "eos_token_id": end, "pad_token_id": end},
            **shared,
        },
    }


def _preprocessor(side: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        **{"do_resize": True, "size": {"shortest_edge": side}, "resample": 3},  # bicubic
        **{"do_center_crop": True, "crop_size": {"height": side, "width": side}},
        **{"do_rescale": True, "rescale_factor": 1 / 255},
        **{"do_normalize": True, "image_mean": MEAN, "image_std": STD},
    }


def _vocabulary() -> dict[str, int]:
    letters = byte_letters()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in read_merges())]
    return {piece: number for number, piece in enumerate([*pieces, START, END])}


def _tokenizer(context_length: int) -> dict[str, Any]:
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    return {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "model_max_length": context_length,
        "do_lower_case": True,
        **special,
    }
