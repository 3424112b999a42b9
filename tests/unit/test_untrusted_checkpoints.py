"""Checkpoints from anybody: nothing in a file runs, none takes more memory than it has bytes, damage is one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cosmos_fast import create_model, load_checkpoint
from cosmos_fast.engine.checkpoint import find_problem
from cosmos_fast.model.stored import FORMAT, part_name
from cosmos_fast.model.weights import CROSSMODAL
from cosmos_fast.utils.errors import UserError
from tests.exchange_models import CONFIG

GIB = 2**30


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return create_model(CONFIG).state_dict()


def refusal(file: Path) -> str:
    """The one line that a file is refused with."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(file, "student")
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewritten(file: Path, edit: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Every member of an archive through `edit(its name, its bytes)`."""
    with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as old, zipfile.ZipFile(file, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, edit(member.filename, old.read(member)))


@pytest.mark.parametrize("kind", ["pt", "old.pt", "safetensors"])
def test_a_file_cut_anywhere_is_damaged(weights, tmp_path, kind):
    file = tmp_path / f"cut.{kind}"
    if kind == "safetensors":
        save_file(weights, file)
    else:
        torch.save({"student": weights}, file, _use_new_zipfile_serialization=kind == "pt")
    whole = file.read_bytes()
    # Every length around the beginning and the end, where heads and directories are, and others in between.
    lengths = {*range(0, 200, 7), *range(0, len(whole), len(whole) // 40), *range(len(whole) - 300, len(whole), 7)}
    for length in sorted(lengths | {len(whole) - 1}):
        file.write_bytes(whole[:length])
        assert "damaged" in refusal(file) or "could run foreign code" in refusal(file), length


def test_an_archive_does_not_unfold(weights, tmp_path):
    """A thousandth of its content on the disk: compressed, or one member's bytes under many names."""
    file = tmp_path / "bomb.pt"
    torch.save({"student": {"visual.proj": torch.zeros(2**22)}}, file)
    rewritten(file, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 2**16
    assert "data.pkl in it is compressed, which torch.save never does" in refusal(file)
    torch.save({"student": weights}, file)
    with zipfile.ZipFile(file, "a") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        archive.filelist.extend([largest] * 100)
        archive.writestr("last", b"")
    assert "claims to hold more bytes than it has" in refusal(file)


def test_a_tensor_may_not_be_larger_than_what_is_stored_of_it(weights, tmp_path):
    wide = torch.zeros(1, 1).expand(2**15, 2**20)
    torch.save(weights | {"token_embedding.weight": wide}, tmp_path / "wide.pt")
    assert "tensors share their elements" in refusal(tmp_path / "wide.pt")
    torch.save(weights | {"token_embedding.weight": wide[:, :64]}, tmp_path / "wide.pt")
    assert "tensors share their elements" in refusal(tmp_path / "wide.pt")
    torch.save({"student": {"visual.proj": torch.ones(4)}}, tmp_path / "long.pt")
    claim = b"J" + (GIB).to_bytes(4, "little")  # of 4 elements, which are a byte's number: K\x04
    rewritten(tmp_path / "long.pt", lambda name, data: data.replace(b"K\x04", claim) if "pkl" in name else data)
    assert "damaged" in refusal(tmp_path / "long.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"text_cfg": {"vocab_size": 10**13}},
        {"text_cfg": {"context_length": 10**13}},
        {"text_cfg": {"layers": 10**9}},
        {"vision_cfg": {"layers": 10**9}},
        {"vision_cfg": {"width": 2**80, "head_width": 2**80}},
        {"vision_cfg": {"image_size": 2**40, "patch_size": 2**40}},
        {"vision_cfg": {"image_size": 2**40}},
        {"embed_dim": 2**23},
    ],
)
def test_a_description_takes_no_memory_that_the_weights_do_not(weights, tmp_path, change):
    described = CONFIG.to_openclip()
    for name, value in change.items():
        described[name] = {**described[name], **value} if isinstance(value, dict) else value
    file = tmp_path / "model.safetensors"
    save_file(weights, file, {"format": FORMAT, "model": json.dumps(described)})
    count = sum(tensor.numel() for tensor in weights.values())
    assert re.search(rf"it describes a model of [\d,]{{10,}} weights, and holds {count:,}$", refusal(file))


def test_a_manifest_of_any_number_of_parts_is_read_at_once(tmp_path):
    names = {"state.json": {}, part_name(0, 10**12): {}}
    for manifest in ({"format": FORMAT, "step": 1, "parts": 10**12, "files": names}, "[" * 10**5):
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        (tmp_path / "manifest.json").write_text(text)
        assert find_problem(tmp_path) in ("manifest.json is damaged", f"its manifest names {sorted(names)}")


def test_nested_descriptions(weights, tmp_path):
    file = tmp_path / "deep.safetensors"
    for described in ("[" * 10**5, '{"embed_dim": ' + "9" * 5000 + "}"):
        save_file(weights, file, {"format": FORMAT, "model": described})
        assert "does not say what model its weights are of" in refusal(file)


def test_weights_are_plain_tensors_of_numbers_each_there_once(weights, tmp_path):
    file, name = tmp_path / "odd.pt", "visual.proj"
    for value, message in (
        (weights[name].to_sparse(), "visual.proj is no plain tensor of floating-point numbers"),
        (weights[name].long(), "visual.proj is no plain tensor of floating-point numbers (torch.int64"),
        (weights[name].to(torch.complex64), "visual.proj is no plain tensor of floating-point numbers"),
        (weights[name].to("meta"), "visual.proj is no plain tensor of floating-point numbers"),
    ):
        torch.save({"student": weights | {name: value}}, file)
        assert message in refusal(file)
    torch.save({"student": weights | {f"module.{name}": weights[name]}}, file)
    assert f"both {name} and module.{name}" in refusal(file)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def storage(count: int, key: str = "0") -> bytes:
    """What the elements of a float tensor are, in a pickle."""
    number = b"J" + count.to_bytes(4, "little")
    parts = text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number
    return b"(" + parts + b"tQ"


SIZE = b"J" + (2**27).to_bytes(4, "little")
ENCODE = b"c_codecs\nencode\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("
ONE_OF_ONE = b"K\x00K\x01\x85K\x01\x85\x89N"  # offset, sizes, strides, requires_grad, hooks
PICKLES = {
    "bytes of a size": (b"cbuiltins\nbytearray\n" + SIZE + b"\x85R", r"\(builtins\.bytearray\)"),
    "as Python 2 names them": (b"c__builtin__\nbytearray\n" + SIZE + b"\x85R", r"\(__builtin__\.bytearray\)"),
    "a storage of a size": (b"ctorch.storage\nTypedStorage\n" + SIZE + b"\x85R", r"\(torch\.storage\.TypedStorage\)"),
    "a known storage, called": (b"ctorch.storage\nUntypedStorage\n" + SIZE + b"\x85R", r"UntypedStorage\)"),
    "a nested tensor": (b"ctorch._utils\n_rebuild_nested_tensor\n(" + storage(1) + b"tR", r"_rebuild_nested_tensor\)"),
    "a coding": (ENCODE + text("a") + text("hex") + b"\x86R", r"\(_codecs\.encode\)"),
    "a coding of bytes": (
        ENCODE * 2 + text("aa") + text("latin1") + b"\x86R" + text("latin1") + b"\x86R",
        r"\(_codecs\.encode\)",
    ),
    "a function out of the memo": (b"]" + ENCODE + b"q\x010h\x01a", "holds POP, which torch.save does not write"),
    "a coding out of the memo": (
        b"](" + ENCODE + b"q\x01" + text("x" * 200) + b"q\x02" + text("latin1") + b"q\x03\x86R"
        + b"h\x01h\x02h\x03\x86R" * 99 + b"e",
        "more memory than it has bytes",
    ),
    "a dict of a list": (b"ccollections\nOrderedDict\n]\x85R", "a dict is made of something"),
    "a tuple for a key": (b"}))K\x01\x86K\x01s", "a key is a tuple"),
    "a sparse tensor of lists": (
        b"ctorch._utils\n_rebuild_sparse_tensor\nN(]]N\x89t\x86R", "a sparse tensor is none"
    ),
    "the state of a tensor": (REBUILD + storage(1) + ONE_OF_ONE + b"tR)b", "what has none"),
    "a tensor beyond its storage": (REBUILD + storage(1) + b"K\x00" + SIZE + b"\x85K\x01\x85\x89NtR", "larger than"),
    "a storage beyond the file": (REBUILD + storage(2**30) + ONE_OF_ONE + b"tR", "more bytes than it has"),
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("wish", PICKLES)
def test_a_pickle_that_asks_for_memory_gets_none(tmp_path, wish, old):
    """Each of a few hundred bytes, in both layouts."""
    pickled, message = PICKLES[wish]
    file = tmp_path / "small.pt"
    torch.save({"student": 1}, file, _use_new_zipfile_serialization=not old)
    evil = b"\x80\x02}" + text("student") + pickled + b"s."
    plain = pickle.dumps({"student": 1}, protocol=2)
    if old:
        assert plain in file.read_bytes()
        file.write_bytes(file.read_bytes().replace(plain, evil))
    else:
        rewritten(file, lambda name, data: evil if name.endswith("data.pkl") else data)
    assert re.search(message, refusal(file))


def test_tensors_of_the_old_layout_have_their_elements_in_the_file(weights, tmp_path):
    file = tmp_path / "old.pt"
    torch.save({"student": weights}, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    keys = whole.rindex(b"\x80\x02]")
    file.write_bytes(whole[:keys] + b"\x80\x02]." + whole[keys:])
    assert "lacks the elements of its tensors" in refusal(file)


def test_what_is_no_checkpoint_wants_nothing(weights, tmp_path):
    """Only a pickle that names something is said to want it."""
    file = tmp_path / "odd.pt"
    save_file(weights, file)
    assert "is damaged or no PyTorch checkpoint" in refusal(file)
    for head in (b"\xc5\x00\x12", b"c\xff\xfe\n\x01\n", b"\x80\x02c1 2\n3\n.", b"I1\n.", b"."):
        file.write_bytes(head)
        assert "is damaged or no PyTorch checkpoint" in refusal(file)


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("place", ["student", "optimizer", "bare", "old"])
def test_a_pickle_that_wants_to_run_code_does_not(weights, tmp_path, place):
    file, bomb = tmp_path / "bomb.pt", Bomb(tmp_path / "ran")
    if place == "bare":
        file.write_bytes(pickle.dumps(bomb, protocol=2))
    else:
        content = {"student": weights, "optimizer": bomb} if place == "optimizer" else {"student": bomb}
        torch.save(content, file, _use_new_zipfile_serialization=place != "old")
    assert re.search(r"objects other than tensors \(posix\.mkdir\) .* foreign code", refusal(file))
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(bomb))
    assert (tmp_path / "ran").exists(), "the bomb does go off elsewhere"


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_a_learning_rate_by_numpy_stands_in_nobodys_way(weights, tmp_path, module):
    """As the schedules of OpenCLIP leave it in the optimizer; under the names of numpy 1 and 2."""
    file = tmp_path / "released.pt"
    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(5e-4), "betas": (0.9, 0.98)}]}
    torch.save({"student": weights, "optimizer": optimizer}, file)
    rewritten(file, lambda _, data: re.sub(rb"numpy\._?core\.multiarray", module.encode(), data))
    found = load_checkpoint(file, "student").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    torch.save({"student": weights | {"visual.proj": np.float64(1)}}, file)
    assert "'visual.proj' among the weights is a scalar" in refusal(file)


def test_a_torchscript_program_is_told_from_damage(tmp_path):
    file = tmp_path / "ViT-B-16.pt"
    torch.save({"student": {"visual.proj": torch.ones(2)}}, file)
    with zipfile.ZipFile(file, "a") as archive:  # what torch.jit adds
        archive.writestr("ViT-B-16/constants.pkl", pickle.dumps(()))
    assert "is a TorchScript program" in refusal(file)


def test_half_precision_becomes_single_and_no_number_is_drawn(weights, tmp_path):
    file = tmp_path / "half.pt"
    half = {name: tensor.half() for name, tensor in weights.items() if not name.startswith(CROSSMODAL)}
    torch.save({"state_dict": half}, file)
    before = torch.get_rng_state()
    found = load_checkpoint(file).state_dict()
    assert torch.equal(torch.get_rng_state(), before), "the weights that are there are not drawn first"
    for name, tensor in half.items():
        assert torch.equal(found[name], tensor.float()), name
