"""Every command that takes a checkpoint, with every kind of checkpoint, and with every kind that is none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cosmos_fast import create_model
from cosmos_fast.cli.main import command, run
from cosmos_fast.config import ModelConfig, TextConfig, VisionConfig
from cosmos_fast.model.stored import MANIFEST, TensorSlice, part_metadata, part_name
from tests.shards import picture, write_shards

# With CLIP's vocabulary, for captions; its shapes tell all of it.
CONFIG = ModelConfig(
    embed_dim=8,
    vision=VisionConfig(image_size=32, patch_size=16, width=64, layers=1),
    text=TextConfig(context_length=16, width=64, heads=1, layers=1),
)
NAMES = ("student", "teacher")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images and captions, and the same two models in every form."""
    root = tmp_path_factory.mktemp("kinds")
    (root / "captions").mkdir()
    for number in range(6):
        (root / f"captions/{number}.jpg").write_bytes(picture(number))
        (root / f"captions/{number}.txt").write_text(f"a picture, number {number}\nsomething {'very ' * number}odd\n")
    models = {}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        models[name] = create_model(CONFIG).state_dict()
    write_ours(root / "run/checkpoints/step_00000002", models)
    write_parts(root / "parts", models)
    plain = {"epoch": 32, "name": "vit_b_16", **models}
    wrapped = {f"module.{name}": tensor for name, tensor in models["student"].items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 5e-4}]}
    torch.save(plain, root / "released.pt")
    torch.save({**plain, "student": wrapped, "optimizer": optimizer}, root / "optimizer.pt")
    torch.save({**plain, "optimizer": optimizer, "scaler": {"scale": 65536.0}}, root / "scaler.pt")
    for to, out in (("original", "ours.pt"), ("safetensors", "ours.safetensors"), ("open_clip", "clip")):
        assert run(command, f"export --checkpoint {root}/released.pt --to {to} --out {root}/{out}".split()) == 0
    clip = {f"module.{name}": tensor for name, tensor in models["teacher"].items() if "distill" not in name}
    clip = {name: tensor for name, tensor in clip.items() if "cross_pool" not in name and "token_mapping" not in name}
    torch.save(clip, root / "bare.pt")
    torch.save({"epoch": 1, "state_dict": clip, "optimizer": optimizer}, root / "openclip.pt")
    save_file({name.removeprefix("module."): tensor for name, tensor in clip.items()}, root / "openclip.safetensors")
    return root


def write_ours(folder: Path, models: dict[str, dict[str, torch.Tensor]]) -> None:
    folder.mkdir(parents=True)
    for name, weights in models.items():
        metadata = {"format": "cosmos-fast/1", "weights": name, "model": json.dumps(CONFIG.to_openclip())}
        save_file(weights, folder / f"{name}.safetensors", metadata)
    (folder / MANIFEST).write_text("{}")


def write_parts(folder: Path, models: dict[str, dict[str, torch.Tensor]]) -> None:
    """As two ranks leave them, each with a half of every tensor."""
    folder.mkdir()
    for rank in range(2):
        slices = {}
        for name, weights in models.items():
            for key, tensor in weights.items():
                half = (tensor.numel() + 1) // 2
                values = tensor.flatten()[:half] if rank == 0 else tensor.flatten()[half:]
                slices[f"{name}/{key}"] = TensorSlice(values.clone(), rank * half, tuple(tensor.shape))
        metadata = part_metadata(slices, rank, 2, CONFIG.to_openclip())
        save_file({key: one.values for key, one in slices.items()}, folder / part_name(rank, 2), metadata)
    (folder / MANIFEST).write_text("{}")


BOTH = ("run", "run/checkpoints", "run/checkpoints/step_00000002", "parts", "released.pt", "optimizer.pt", "scaler.pt")
BOTH += ("ours.pt",)
ONE = ("ours.safetensors", "clip/open_clip_model.safetensors", "bare.pt", "openclip.pt", "openclip.safetensors")


def evaluated(place: Path, checkpoint: str, weights: str, out: Path) -> dict:
    arguments = ["eval", "run", "--checkpoint", f"{place}/{checkpoint}", "--weights", weights, "--device", "cpu"]
    assert run(command, [*arguments, "--benchmark", f"captions={place}/captions", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    out.unlink()
    assert len(content["checkpoint"]["sha256"]) == 64
    return content["benchmarks"]["captions"]


def test_eval_measures_the_same_of_every_kind_of_checkpoint(place, tmp_path, capsys):
    expected = {weights: evaluated(place, "run", weights, tmp_path / "out.json") for weights in NAMES}
    assert expected["student"] != expected["teacher"]
    for checkpoint in BOTH[1:]:
        for weights in NAMES:
            assert evaluated(place, checkpoint, weights, tmp_path / "out.json") == expected[weights], checkpoint
    for checkpoint in ONE:
        assert evaluated(place, checkpoint, "teacher", tmp_path / "out.json") == expected["teacher"], checkpoint
    assert not list(tmp_path.iterdir())


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def spoilt(place: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no checkpoint of this architecture, and what is said of each."""
    folder = place / "spoilt"
    folder.mkdir()
    torch.save({"teacher": Bomb(place / "ran")}, folder / "bomb.pt")
    for name in ("released.pt", "ours.safetensors"):
        whole = (place / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) * 2 // 3])
    weights = torch.load(place / "released.pt", weights_only=True)["teacher"]
    del weights["visual.proj"]
    torch.save({"teacher": weights}, folder / "lacks.pt")
    torch.save({"state_dict": {"layer1.0.conv1.weight": torch.ones(3)}}, folder / "resnet.pt")
    shutil.copytree(place / "parts", folder / "parts")
    (folder / "parts" / part_name(1, 2)).unlink()
    return {
        "a pickle that wants to run code": (folder / "bomb.pt", "could run foreign code"),
        "a truncated .pt": (folder / "released.pt", "is damaged"),
        "a truncated .safetensors": (folder / "ours.safetensors", "is damaged"),
        "without one of its weights": (folder / "lacks.pt", "missing: visual.proj"),
        "of another architecture": (folder / "resnet.pt", "not the weights of a CLIP or COSMOS model"),
        "one part of two": (folder / "parts", f"{folder}/parts"),
        "absent": (folder / "absent.pt", "absent.pt does not exist"),
        "text": (place / "captions/0.txt", "is damaged"),
    }


KINDS = ("a pickle that wants to run code", "a truncated .pt", "a truncated .safetensors", "without one of its weights",
         "of another architecture", "one part of two", "absent", "text")  # fmt: skip
COMMANDS = {
    "eval": "eval run --checkpoint {file} --device cpu --benchmark captions={place}/captions --out {out}/x.json",
    "export": "export --checkpoint {file} --weights teacher --to hf --out {out}/x",
    "visualize": "visualize attention --checkpoint {file} --device cpu --image {place}/captions/0.jpg --caption a "
    "--out {out}/x",
    "init.path": "train --recipe demo --set data.train={place}/shards --set evaluate.data=null --set init.path={file} "
    "--set run.device=cpu --set run.out_dir={out} --set data.workers=0 --set data.loader=pil",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_checkpoint_is_one_line_and_leaves_nothing(place, spoilt, tmp_path, capsys, kind):
    if not (place / "shards").is_dir():
        write_shards(place / "shards", (80,))
    file, message = spoilt[kind]
    for name, line in COMMANDS.items():
        assert run(command, line.format(file=file, place=place, out=tmp_path).split()) == 2, name
        lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
        assert len(lines) == 1, name
        assert message in lines[0], name
        assert not list(tmp_path.iterdir()), name
    assert not (place / "ran").exists()


def test_training_of_another_architecture_names_the_setting(place, tmp_path, capsys):
    write_shards(place / "shards", (80,))
    line = COMMANDS["init.path"].format(file=place / "released.pt", place=place, out=tmp_path)
    assert run(command, line.split()) == 2
    assert "released.pt is of another architecture: its model." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
