"""Checkpoints in parts: what several ranks have written is read as what one process would have."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cosmos_fast import create_model, load_checkpoint
from cosmos_fast.config import ModelConfig, TextConfig, VisionConfig
from cosmos_fast.engine import checkpoint
from cosmos_fast.engine.checkpoint import Part, Snapshot
from cosmos_fast.engine.rng import rng_state
from cosmos_fast.engine.state import TrainState
from cosmos_fast.engine.zero_layout import FlatLayout
from cosmos_fast.engine.zero_state import STORED_AS, slices_of_parts, slices_of_whole, step_slices
from cosmos_fast.model.stored import StoredTensors, TensorSlice
from cosmos_fast.utils.errors import UserError

SMALL = ModelConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=32, patch_size=16, width=128, layers=1),
    text=TextConfig(context_length=12, vocab_size=60, width=64, heads=1, layers=1),
)
SHAPES = {name: tuple(tensor.shape) for name, tensor in create_model(SMALL).state_dict().items()}
FORMS = ("split_each", "in_a_row", "whole")  # how a rank holds its state: two kinds of flat buffers, or all of it


def states(seed: int) -> dict[str, dict[str, Tensor]]:
    """A state of the optimizer -> whole tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        state: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for state in STORED_AS
    }


def slices_of(whole: dict[str, dict[str, Tensor]], form: str, rank: int, world: int) -> dict[str, TensorSlice]:
    """What a rank gives."""
    held: dict[int, dict[str, Tensor]] = {}  # by the address of the master: its states
    if form == "whole":
        held = {master.data_ptr(): {s: whole[s][name] for s in STORED_AS} for name, master in whole["master"].items()}
        return slices_of_whole(whole["master"], lambda p, s: held[p.data_ptr()][s], rank, world, copy=True)
    flats = []
    for own in (list(SHAPES)[0::2], list(SHAPES)[1::2]):
        counts = [whole["master"][name].numel() for name in own]
        shares = [-(-count // world) for count in counts] if form == "split_each" else None
        layout = FlatLayout.of(own, [SHAPES[name] for name in own], shares)
        like = torch.zeros(-(-sum(counts) // world) + 5 if shares is None else sum(shares) + 3)
        buffers = {s: layout.part(whole[s], rank, like) for s in STORED_AS}
        held[buffers["master"].data_ptr()] = buffers
        flats.append((buffers["master"], layout))
    return slices_of_parts(flats, lambda p, s: held[p.data_ptr()][s], rank, copy=False)


def parts_of(whole: dict[str, dict[str, Tensor]], form: str, world: int, step: int) -> list[Part]:
    """What each of so many ranks gives to a checkpoint."""
    found = []
    for rank in range(world):
        slices = slices_of(whole, form, rank, world)
        slices |= step_slices(list(SHAPES), step) if rank == 0 else {}
        state = TrainState(step=step, position=10 * step)
        found.append(Part(rank, world, slices, state, SMALL.to_openclip(), rng_state()))
    return found


def save_parts(root: Path, parts: list[Part]) -> Path:
    aside = checkpoint.begin(root, parts[0].state.step)
    for part in reversed(parts):  # in any order
        checkpoint.write(aside, part)
    return checkpoint.publish(aside, len(parts))


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize("form", FORMS)
def test_parts_are_read_as_whole_tensors(form: str, world: int, tmp_path: Path) -> None:
    whole = states(0)
    folder = save_parts(tmp_path / "checkpoints", parts_of(whole, form, world, 5))
    loaded = checkpoint.load(folder)
    assert (loaded.state.step, loaded.state.position, loaded.model) == (5, 50, SMALL.to_openclip())
    expected = {f"{state}/{name}": t for state in ("exp_avg", "exp_avg_sq") for name, t in whole[state].items()}
    expected |= {f"step/{name}": torch.tensor(5) for name in SHAPES}
    for found, tensors in (
        (loaded.student, whole["master"]),
        (loaded.teacher, whole["teacher"]),
        (loaded.optimizer, expected),
    ):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name
    for weights, state in (("student", "master"), ("teacher", "teacher")):
        for place in (folder, tmp_path):
            model = load_checkpoint(place, weights)
            assert model.config == SMALL
            assert all(torch.equal(t, whole[state][name]) for name, t in model.state_dict().items())


def lose(part: Path) -> None:
    part.unlink()


def truncate(part: Path) -> None:
    os.truncate(part, part.stat().st_size - 4)


def flip_a_byte(part: Path) -> None:
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)


def of_another_world(part: Path) -> None:
    manifest = json.loads((part.parent / "manifest.json").read_text())
    (part.parent / "manifest.json").write_text(json.dumps({**manifest, "parts": 3}))


def without_parts(part: Path) -> None:
    manifest = json.loads((part.parent / "manifest.json").read_text())
    del manifest["parts"]
    (part.parent / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = (
    (lose, "part_00001_of_00002.safetensors is missing"),
    (truncate, "part_00001_of_00002.safetensors has "),
    (flip_a_byte, "part_00001_of_00002.safetensors has changed"),
    (of_another_world, "its manifest names"),
    (without_parts, "its manifest names"),
)


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_part_is_named_and_the_checkpoint_before_used(damage, message, tmp_path: Path, caplog) -> None:
    former, newest = (save_parts(tmp_path, parts_of(states(step), "in_a_row", 2, step)) for step in (1, 2))
    damage(newest / "part_00001_of_00002.safetensors")
    with caplog.at_level("WARNING", logger="cosmos_fast"):
        assert checkpoint.newest_valid(tmp_path) == former
    assert message in caplog.text
    with pytest.raises(UserError, match="is unusable"):
        checkpoint.load(newest)


def test_parts_that_do_not_belong_together_are_refused_in_one_line(tmp_path: Path) -> None:
    """Also by the reader that knows no manifest's digests."""
    two, three = (save_parts(tmp_path / str(world), parts_of(states(0), "in_a_row", world, 1)) for world in (2, 3))
    with pytest.raises(UserError, match=r"one of several parts.*give the folder"):
        load_checkpoint(two / "part_00000_of_00002.safetensors")
    shutil.copy(three / "part_00001_of_00003.safetensors", two)
    with pytest.raises(UserError, match="parts of 2 and 3 ranks"):
        load_checkpoint(two)
    lose(three / "part_00002_of_00003.safetensors")
    with pytest.raises(UserError, match="lacks part_00002_of_00003"):
        load_checkpoint(three)
    other = save_parts(tmp_path / "other", parts_of(states(0), "split_each", 2, 1))
    (two / "part_00001_of_00003.safetensors").unlink()
    shutil.copy(other / "part_00000_of_00002.safetensors", two)
    with pytest.raises(UserError, match="do not add up to the whole of"):
        load_checkpoint(two)
    truncate(other / "part_00001_of_00002.safetensors")
    with pytest.raises(UserError, match="is damaged or no safetensors file"):
        load_checkpoint(other)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    whole = states(0)
    folder = save_parts(tmp_path, parts_of(whole, "split_each", 3, 1))
    alone = Snapshot(whole["master"], whole["teacher"], {}, TrainState(step=2), SMALL.to_openclip(), rng_state())
    for place in (folder, checkpoint.save(tmp_path, alone, keep=9)):
        stored = StoredTensors(place, "student")
        for name, tensor in whole["master"].items():
            flat = tensor.reshape(-1)
            for start in {0, len(flat) // 3, len(flat) - 1}:
                count = (len(flat) - start + 1) // 2
                assert torch.equal(stored.range(name, start, count), flat[start : start + count]), (place, name)


def test_a_rank_whose_folder_is_another_one_is_told(tmp_path: Path) -> None:
    """Where the ranks do not share the run folder."""
    parts = parts_of(states(0), "in_a_row", 2, 1)
    aside = checkpoint.begin(tmp_path, 1)
    checkpoint.write(aside, parts[0])
    with pytest.raises(UserError, match=r"rank 1 does not see the folder .* which all ranks have to share"):
        checkpoint.write(tmp_path / "elsewhere" / aside.name, parts[1])
    with pytest.raises(UserError, match=r"what rank 1 has written is not in .* which all ranks have to share"):
        checkpoint.publish(aside, 2)
    assert checkpoint.list_checkpoints(tmp_path) == []
