"""Models from and to OpenCLIP, by OpenCLIP itself: features of both programs agree."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from cosmos_fast import load_checkpoint
from cosmos_fast.cli.main import command, run
from cosmos_fast.config import ModelConfig
from cosmos_fast.data.images import MEAN, STD
from tests.exchange_models import CONFIG, OTHER, inputs, write_model
from tests.foreign import imported


def assert_same_features(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    images, tokens = inputs(ours.config)
    with torch.inference_mode():
        for name, given in (("encode_image", images), ("encode_text", tokens)):
            for normalize in (False, True):
                expected = getattr(ours, name)(given, normalize=normalize)
                found = getattr(theirs, name)(given, normalize=normalize)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert theirs.logit_scale == ours.logit_scale


@pytest.fixture(params=[CONFIG, OTHER], ids=["usual", "other"])
def exported(request, tmp_path):
    """A COSMOS model with other weights as its student, and the folder that its teacher was exported to."""
    file, out = tmp_path / "cosmos.safetensors", tmp_path / "clip"
    model = write_model(file, request.param)
    assert run(command, ["export", "--checkpoint", f"{file}", "--to", "open_clip", "--out", f"{out}"]) == 0
    return model, out


def test_open_clip_loads_the_folder(exported):
    model, out = exported
    open_clip = imported("open_clip")
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    assert_same_features(theirs.eval(), model)
    normalize = transform.transforms[-1]
    assert (tuple(normalize.mean), tuple(normalize.std)) == (MEAN, STD)
    assert transform.transforms[0].size == model.config.vision.image_size
    assert open_clip.get_tokenizer(f"local-dir:{out}").context_length == model.config.text.context_length


def test_we_load_the_folder(exported):
    model, out = exported
    assert sorted(path.name for path in out.iterdir()) == ["open_clip_config.json", "open_clip_model.safetensors"]
    clip = load_checkpoint(out / "open_clip_model.safetensors")
    assert clip.config == ModelConfig(**{**vars(model.config), "crossmodal": False})
    weights = model.state_dict()
    assert len(weights) - len(clip.state_dict()) == 21
    for name, tensor in clip.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_we_load_what_open_clip_saves(tmp_path, ending):
    open_clip = imported("open_clip")
    torch.manual_seed(1)
    described = CONFIG.to_openclip()
    theirs = open_clip.CLIP(CONFIG.embed_dim, described["vision_cfg"], described["text_cfg"]).eval()
    file = tmp_path / f"clip.{ending}"
    if ending == "pt":  # as its training saves: wrapped, with what else it keeps
        wrapped = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
        torch.save({"epoch": 3, "name": "clip", "state_dict": wrapped, "optimizer": {}}, file)
    else:
        save_file(theirs.state_dict(), file)
    ours = load_checkpoint(file)
    assert ours.config == ModelConfig(**{**vars(CONFIG), "crossmodal": False})
    assert_same_features(theirs, ours)


def test_only_a_former_export_is_replaced(exported, capsys):
    model, out = exported
    arguments = ["export", "--checkpoint", f"{out.parent}/cosmos.safetensors", "--to", "open_clip", "--out", f"{out}"]
    assert run(command, arguments) == 2
    assert "exists already" in capsys.readouterr().err
    (out / "open_clip_config.json").write_text("{}")
    assert run(command, [*arguments, "--overwrite"]) == 0
    assert json.loads((out / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"] == model.config.embed_dim
    (out / "thesis.txt").touch()
    assert run(command, [*arguments, "--overwrite"]) == 2
    assert "holds thesis.txt, so it is no former export" in capsys.readouterr().err
    assert run(command, [*arguments[:-1], f"{out.parent}/cosmos.safetensors", "--overwrite"]) == 2
    assert "writes a folder" in capsys.readouterr().err
    assert len(list(out.iterdir())) == 3
    assert sorted(path.name for path in out.parent.iterdir()) == ["clip", "cosmos.safetensors"]
