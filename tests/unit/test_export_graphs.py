"""Models for transformers, onnxruntime and torch.export, re-loaded by each: features agree with ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_fast import load_checkpoint, tokenize
from cosmos_fast.cli.main import command, run
from cosmos_fast.config import ModelConfig, TextConfig, VisionConfig
from cosmos_fast.data.images import eval_transform
from cosmos_fast.data.tokenizer import END_ID, VOCAB_SIZE
from tests.exchange_models import CONFIG, OTHER, inputs, write_model
from tests.foreign import imported

# CLIP's vocabulary: with it, what prepares texts is exported too.
WORDS = ModelConfig(
    embed_dim=8,
    vision=VisionConfig(image_size=32, patch_size=16, width=64, layers=1),
    text=TextConfig(context_length=16, width=8, heads=1, layers=1),
)


def exported(folder: Path, to: str, config: ModelConfig) -> Path:
    write_model(folder / "cosmos.safetensors", config)
    out = folder / to
    assert run(command, ["export", "--checkpoint", f"{folder}/cosmos.safetensors", "--to", to, "--out", f"{out}"]) == 0
    return out


def expected(folder: Path, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of the inputs by `load_checkpoint`, and the model."""
    model = load_checkpoint(folder / "cosmos.safetensors")
    images, tokens = inputs(model.config)
    with torch.inference_mode():
        return model.encode_image(images[:count]), model.encode_text(tokens[:count])


def close(found: object, truth: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["usual", "other"])
def test_transformers_loads_the_folder(tmp_path, config):
    transformers = imported("transformers")
    out = exported(tmp_path, "hf", config)
    theirs, report = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images, tokens = inputs(config)
    with torch.inference_mode():
        found = theirs.eval()(input_ids=tokens, pixel_values=images)
    for features, truth in zip((found.image_embeds, found.text_embeds), expected(tmp_path), strict=True):
        close(features, truth)
    assert theirs.logit_scale == load_checkpoint(tmp_path / "cosmos.safetensors").logit_scale


@pytest.mark.parametrize("padding", [0, 128])
def test_transformers_prepares_texts_and_images_alike(tmp_path, padding):
    """padding: rows of the token embedding that no token of CLIP's vocabulary has."""
    transformers = imported("transformers")
    out = exported(tmp_path, "hf", replace(WORDS, text=replace(WORDS.text, vocab_size=VOCAB_SIZE + padding)))
    texts = ["A red star!", "two dogs' bowls, 42 of them", "un café", "word " * 40]
    found = transformers.CLIPTokenizer.from_pretrained(out)(texts, padding="max_length", truncation=True)["input_ids"]
    ids = tokenize(texts, 16)
    end = ids.argmax(dim=1, keepdim=True)
    padded = torch.where(torch.arange(16) > end, END_ID, ids)  # they pad with the end token
    assert torch.equal(torch.tensor(found), padded)
    model = load_checkpoint(tmp_path / "cosmos.safetensors")
    with torch.inference_mode():
        clip = transformers.CLIPModel.from_pretrained(out).eval()
        features = clip.get_text_features(input_ids=torch.tensor(found))
        features = getattr(features, "pooler_output", features)
        close(torch.nn.functional.normalize(features, dim=-1), model.encode_text(ids))
    theirs, ours = prepared_images(out, 140)  # 44 pixels wide before it is cut to 32
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02)


def test_transformers_cuts_beside_ours_where_the_margin_is_3_modulo_4(tmp_path):
    """Half of it, 1.5 pixels, is rounded to 2 by us, as torchvision does, and to 1 by them."""
    imported("transformers")
    theirs, ours = prepared_images(exported(tmp_path, "hf", WORDS), 110)  # 35 pixels wide before it is cut to 32
    assert (theirs - ours).abs().max() > 0.1
    torch.testing.assert_close(theirs[..., 1:], ours[..., :-1], rtol=0, atol=0.02)


def prepared_images(out: Path, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of 100 pixels' height, prepared by the exported settings and by us."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    file = out.parent / "noise.png"
    Image.fromarray(pixels).resize((width, 100)).save(file)
    prepare = pytest.importorskip("transformers.models.clip.image_processing_pil_clip").CLIPImageProcessorPil
    theirs = prepare.from_pretrained(out)(Image.open(file), return_tensors="pt")["pixel_values"]
    return theirs[0], eval_transform(file.read_bytes(), 32)


@pytest.mark.parametrize("config", [pytest.param(CONFIG, marks=pytest.mark.long), OTHER], ids=["usual", "other"])
def test_torch_export_of_any_batch(tmp_path, config):
    out = exported(tmp_path, "torch_export", config)
    for count in (1, 3):
        images, tokens = inputs(config)
        for name, given, truth in zip(("image", "text"), (images, tokens), expected(tmp_path, count), strict=True):
            close(torch.export.load(out / f"{name}.pt2").module()(given[:count]), truth)
    check_description(out, config)


@pytest.mark.long
@pytest.mark.parametrize("config", [CONFIG, OTHER], ids=["usual", "other"])
def test_onnxruntime_of_any_batch(tmp_path, config):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    out = exported(tmp_path, "onnx", config)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "image.onnx", "text.onnx"]
    for count in (1, 3):
        images, tokens = inputs(config)
        given = {"image": {"images": images[:count].numpy()}, "text": {"tokens": tokens[:count].numpy()}}
        for name, truth in zip(given, expected(tmp_path, count), strict=True):
            session = runtime.InferenceSession(out / f"{name}.onnx", providers=["CPUExecutionProvider"])
            assert [output.name for output in session.get_outputs()] == ["features"]
            close(session.run(None, given[name])[0], truth)
    check_description(out, config)


def check_description(out: Path, config: ModelConfig) -> None:
    found = json.loads((out / "config.json").read_text())
    scale = float(load_checkpoint(out.parent / "cosmos.safetensors").logit_scale.detach().exp())
    shape = {"image_size": config.vision.image_size, "context_length": config.text.context_length}
    assert found.items() >= {**shape, "embed_dim": config.embed_dim, "logit_scale": scale}.items()


def test_what_is_missing_is_named_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cosmos_fast.exchange.export.find_spec", lambda name: None if name == "onnxscript" else name)
    assert run(command, ["export", "--checkpoint", "absent", "--to", "onnx", "--out", f"{tmp_path}/out"]) == 2
    assert "--to onnx needs onnxscript: pip install 'cosmos-fast[onnx]'" in capsys.readouterr().err
