"""`load_checkpoint`: every format it reads, and every way a file can be wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cosmos_fast import create_model, load_checkpoint
from cosmos_fast.config import ModelConfig, TextConfig, VisionConfig
from cosmos_fast.model.checkpoints import FORMAT
from cosmos_fast.model.weights import DESCRIPTION
from cosmos_fast.utils.errors import UserError

# Head width 64 and 8 pooling heads: what a checkpoint without a description is taken to have.
SMALL = ModelConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=32, patch_size=16, width=128, layers=2),
    text=TextConfig(context_length=12, vocab_size=60, width=64, heads=1, layers=3),
)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    return create_model(SMALL), create_model(SMALL)


def _assert_same_weights(model, expected):
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_released_format_with_module_prefix(tmp_path, pair):
    student, teacher = pair
    path = tmp_path / "released.pt"
    prefixed = {f"module.{name}": tensor for name, tensor in student.state_dict().items()}
    torch.save({"epoch": 32, "name": "x", "student": prefixed, "teacher": teacher.state_dict(), "optimizer": {}}, path)
    loaded = load_checkpoint(path, weights="student")
    assert loaded.config == SMALL
    assert not loaded.training
    _assert_same_weights(loaded, student)
    _assert_same_weights(load_checkpoint(path), teacher)


def test_openclip_formats(tmp_path):
    clip = create_model(ModelConfig(**{**vars(SMALL), "crossmodal": False}))
    torch.save({"epoch": 1, "state_dict": clip.state_dict()}, tmp_path / "clip.pt")
    torch.save(clip.state_dict(), tmp_path / "bare.pt")
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    for name in ("clip.pt", "bare.pt", "clip.safetensors"):
        loaded = load_checkpoint(tmp_path / name)
        assert not loaded.config.crossmodal
        _assert_same_weights(loaded, clip)


def _write_step(folder, student, teacher, complete=True):
    folder.mkdir(parents=True)
    for weights, model in (("student", student), ("teacher", teacher)):
        metadata = {"format": FORMAT, "model": json.dumps(model.config.to_openclip()), "weights": weights}
        save_file(model.state_dict(), folder / f"{weights}.safetensors", metadata)
    if complete:
        (folder / "manifest.json").write_text("{}")


def test_run_folder_gives_its_newest_complete_checkpoint(tmp_path, pair):
    student, teacher = pair
    _write_step(tmp_path / "checkpoints/step_00000010", teacher, student)
    _write_step(tmp_path / "checkpoints/step_00000020", student, teacher)
    _write_step(tmp_path / "checkpoints/step_00000030", teacher, teacher, complete=False)
    _assert_same_weights(load_checkpoint(tmp_path, weights="student"), student)
    _assert_same_weights(load_checkpoint(tmp_path), teacher)
    _assert_same_weights(load_checkpoint(tmp_path / "checkpoints/step_00000010"), student)


class _Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('foreign code ran')",))


def _truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def test_untrusted_pickle_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"student": _Bomb()}, path)
    with pytest.raises(UserError, match="could run foreign code"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(UserError, match=r"bomb\.pt"):
        load_checkpoint(path)


def test_damaged_files_are_told_in_one_line(tmp_path, pair):
    torch.save({"student": pair[0].state_dict()}, tmp_path / "cut.pt")
    save_file(pair[0].state_dict(), tmp_path / "cut.safetensors")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.safetensors").write_text("hello")
    _truncate(tmp_path / "cut.pt", 5000)
    _truncate(tmp_path / "cut.safetensors", 5000)
    for name in ("cut.pt", "cut.safetensors", "empty.pt", "text.safetensors"):
        with pytest.raises(UserError, match=name) as caught:
            load_checkpoint(tmp_path / name, weights="student")
        assert "\n" not in str(caught.value)


def test_weights_that_are_none_are_told_in_one_line(tmp_path, pair):
    weights = pair[0].state_dict()
    metadata = {"format": FORMAT, "weights": "student"}
    save_file(weights, tmp_path / "nameless.safetensors", metadata)
    save_file(weights, tmp_path / "list.safetensors", metadata | {"model": "[1]"})
    save_file(weights, tmp_path / "cut.safetensors", metadata | {"model": '{"embed_dim":'})
    torch.save({"student": weights | {"visual.conv1.weight": 3}}, tmp_path / "number.pt")
    torch.save(weights | {"visual.conv1.weight": torch.zeros(3)}, tmp_path / "flat.pt")
    torch.save(weights | {"visual.conv1.weight": torch.zeros(5, 3, 16, 16)}, tmp_path / "width.pt")
    for name, message in (
        ("nameless.safetensors", "does not say what model its weights are of"),
        ("cut.safetensors", "does not say what model its weights are of"),
        ("list.safetensors", "expected a dict, not a list"),
        ("number.pt", "'visual.conv1.weight' among the weights is a int, expected a tensor"),
        ("flat.pt", r"visual.conv1.weight is \(3,\)"),
        ("width.pt", "model.vision.width=5 is not a multiple of"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            load_checkpoint(tmp_path / name, weights="student")
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(tmp_path, pair):
    with pytest.raises(UserError, match=r"nowhere\.pt does not exist"):
        load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match=r"no student\.safetensors \(it holds no weights\)"):
        load_checkpoint(tmp_path, weights="student")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        load_checkpoint(tmp_path)
    weights = pair[0].state_dict()
    torch.save({"student": weights}, tmp_path / "student_only.pt")
    with pytest.raises(UserError, match="holds no teacher weights"):
        load_checkpoint(tmp_path / "student_only.pt")
    torch.save({"epoch": 3}, tmp_path / "nothing.pt")
    with pytest.raises(UserError, match=r"holds no weights \(keys: epoch\)"):
        load_checkpoint(tmp_path / "nothing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pt")
    del weights["visual.conv1.weight"]
    torch.save({"student": weights}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"not the weights of a CLIP or COSMOS model: visual\.conv1\.weight missing"):
        load_checkpoint(tmp_path / "other.pt", weights="student")
    with pytest.raises(UserError, match="choose 'teacher' or 'student'"):
        load_checkpoint(tmp_path, weights="ema")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."])
def test_prefixes_of_wrappers_are_dropped(tmp_path, pair, prefix):
    torch.save({"student": {f"{prefix}{name}": one for name, one in pair[0].state_dict().items()}}, tmp_path / "a.pt")
    _assert_same_weights(load_checkpoint(tmp_path / "a.pt", "student"), pair[0])


def test_openai_weights_load_and_say_that_features_differ(tmp_path, caplog):
    """A state dict of OpenAI's programs holds three numbers beside the weights."""
    clip = create_model(ModelConfig(**{**vars(SMALL), "crossmodal": False}))
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(60)}
    torch.save(clip.state_dict() | numbers, tmp_path / "openai.pt")
    _assert_same_weights(load_checkpoint(tmp_path / "openai.pt"), clip)
    assert "trained with QuickGELU" in caplog.text


def test_heads_of_another_width_need_openclips_description(tmp_path):
    vision = VisionConfig(image_size=32, patch_size=16, width=1280, layers=1, head_width=80)
    config = ModelConfig(**{**vars(SMALL), "vision": vision, "crossmodal": False})
    model, file, beside = create_model(config), tmp_path / "open_clip_model.safetensors", tmp_path / DESCRIPTION
    save_file(model.state_dict(), file)
    with pytest.raises(UserError, match=r"put its open_clip_config\.json beside the file$"):
        load_checkpoint(file)
    known = {name: config.to_openclip()[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
    beside.write_text(json.dumps({"model_cfg": known, "preprocess_cfg": {}}))
    assert load_checkpoint(file).config == config
    for content, message in (
        ("[", "is damaged"),
        ("[1]", "is damaged"),
        ('{"model_cfg": {"embed_dim": ' + "9" * 5000 + "}}", "is damaged"),
        (json.dumps({"model_cfg": {**known, "embed_dim": 64}}), "describes another model"),
        (json.dumps({"model_cfg": {**known, "quick_gelu": True}}), "quick_gelu, an activation that is not supported"),
        (json.dumps({"model_cfg": {**known, "vision_cfg": {"timm_model_name": "x"}}}), "timm_model_name not supported"),
    ):
        beside.write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            load_checkpoint(file)
        assert str(caught.value).startswith(f"{file}: {DESCRIPTION} beside it")


def test_a_path_that_is_too_long(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, ending):
    """The user of the tests may read all files."""
    file = tmp_path / f"weights.{ending}"
    file.touch()
    opened = io.open

    def forbidden(path: Any, *arguments: Any, **options: Any) -> Any:
        if path == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(path, *arguments, **options)

    for module in ("io", "builtins"):
        monkeypatch.setattr(f"{module}.open", forbidden)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)$"):
        load_checkpoint(file)
