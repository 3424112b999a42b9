"""Models from and to OpenCLIP, by OpenCLIP itself: features of both programs agree."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from cosmos_fast import create_model, load_checkpoint
from cosmos_fast.cli.main import command, run
from cosmos_fast.config import ModelConfig, TextConfig, VisionConfig
from cosmos_fast.data.images import MEAN, STD
from tests import foreign

CONFIG = ModelConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=32, patch_size=16, width=128, layers=2),
    text=TextConfig(context_length=12, vocab_size=60, width=64, heads=1, layers=3),
)
# Of heads that shapes do not tell, on a crop of another ratio of size and patch.
OTHER = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=48, patch_size=8, width=24, layers=1, head_width=8),
    text=TextConfig(context_length=9, vocab_size=70, width=32, heads=4, layers=2),
    pool_heads=2,
)


def scrambled(config: ModelConfig) -> torch.nn.Module:
    """A model none of whose weights has its initial value: zeros and ones would hide a swap."""
    torch.manual_seed(3)
    model = create_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, and captions of several lengths with start and end."""
    generator = torch.Generator().manual_seed(5)
    side, vocabulary = config.vision.image_size, config.text.vocab_size
    images = torch.randn(3, 3, side, side, generator=generator)
    tokens = torch.zeros(4, config.text.context_length, dtype=torch.int64)
    for row, length in zip(tokens, (3, 5, 7, config.text.context_length), strict=True):
        row[1 : length - 1] = torch.randint(1, vocabulary - 2, (length - 2,), generator=generator)
        row[0], row[length - 1] = vocabulary - 2, vocabulary - 1
    return images, tokens


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
    model = scrambled(request.param)
    metadata = {"format": "cosmos-fast/1", "weights": "teacher", "model": json.dumps(model.config.to_openclip())}
    save_file(model.state_dict(), tmp_path / "cosmos.safetensors", metadata)
    file, out = tmp_path / "cosmos.safetensors", tmp_path / "clip"
    assert run(command, ["export", "--checkpoint", f"{file}", "--to", "open_clip", "--out", f"{out}"]) == 0
    return model, out


def test_open_clip_loads_the_folder(exported):
    model, out = exported
    open_clip = foreign.open_clip()
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
    open_clip = foreign.open_clip()
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
