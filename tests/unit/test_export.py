"""`cosmos-fast export`: files that hold the weights to the bit, whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_fast import create_model, load_checkpoint
from cosmos_fast.cli.main import command
from cosmos_fast.cli.main import run as run_command
from cosmos_fast.engine.checkpoint import list_checkpoints
from cosmos_fast.engine.run_folder import plan_run
from cosmos_fast.exchange import export as exporting
from cosmos_fast.model.checkpoints import WeightsOf
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.utils.errors import UserError
from tests.tiny_run import make_trainer, tiny_config

OFFERED: tuple[WeightsOf, ...] = ("student", "teacher")
# Heads of 64 channels, 8 in the pooling: what a file without a description is taken to have.
MODEL = (
    "model.embed_dim=16",
    "model.pool_heads=8",
    "model.vision={image_size: 16, patch_size: 8, width: 64, layers: 1, head_width: 64}",
    "model.text={context_length: 8, vocab_size: 64, width: 64, heads: 1, layers: 1}",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with two checkpoints, after 2 and 3 steps; 12 samples are an epoch and a fifth."""
    root = tmp_path_factory.mktemp("runs")
    trainer = make_trainer(tiny_config(root, *MODEL, "run.max_steps=3", "run.checkpoint_every_steps=2"))
    trainer.loader.samples_per_epoch = 10
    trainer.fit()
    return trainer.plan.folder


def export(*arguments: object) -> int:
    return run_command(command, ["export", *map(str, arguments)])


def assert_same(model: CosmosModel, expected: CosmosModel) -> None:
    assert model.config == expected.config
    weights = expected.state_dict()
    assert list(model.state_dict()) == list(weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_original_holds_what_a_released_file_does(run, tmp_path, capsys):
    out = tmp_path / "cosmos.pt"
    assert export("--checkpoint", run, "--to", "original", "--out", out) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"wrote {out}: student and teacher of demo, ")
    content = torch.load(out, weights_only=True)
    assert list(content) == ["epoch", "name", "model", "student", "teacher"]
    assert (content["epoch"], content["name"]) == (1, "demo")
    assert all(tensor.dtype == torch.float32 for weights in OFFERED for tensor in content[weights].values())
    for weights in OFFERED:
        assert_same(load_checkpoint(out, weights), load_checkpoint(run, weights))
    student, teacher = (load_checkpoint(out, weights).state_dict() for weights in OFFERED)
    assert not torch.equal(student["visual.proj"], teacher["visual.proj"])


@pytest.mark.parametrize("weights", OFFERED)
def test_one_model_and_where_it_comes_from(run, tmp_path, weights):
    """From a run folder, a folder of checkpoints, one checkpoint, and what was exported before."""
    expected = load_checkpoint(run, weights)
    newest = list_checkpoints(run / "checkpoints")[-1]
    for place, source in enumerate((run, run / "checkpoints", newest)):
        out = tmp_path / f"{place}.safetensors"
        assert export("--checkpoint", source, "--weights", weights, "--to", "safetensors", "--out", out) == 0
        assert_same(load_checkpoint(out, weights), expected)
        assert_same(load_checkpoint(out, "student" if weights == "teacher" else "teacher"), expected)
    for place, to in ((3, "original"), (4, "safetensors"), (5, "original")):
        ending = ".pt" if to == "original" else ".safetensors"
        last, out = out, tmp_path / f"{place}{ending}"
        assert export("--checkpoint", last, "--weights", weights, "--to", to, "--out", out) == 0
        assert_same(load_checkpoint(out, weights), expected)
    assert list(torch.load(out, weights_only=True)) == ["epoch", "name", "model", weights]


def test_equal_weights_give_equal_bytes(run, tmp_path):
    files = [tmp_path / name for name in ("one.pt", "other.pt")]
    for out in files:
        assert export("--checkpoint", run, "--to", "original", "--out", out) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_teacher_is_what_a_format_of_one_model_gets(run, tmp_path):
    out = tmp_path / "model.safetensors"
    assert export("--checkpoint", run, "--to", "safetensors", "--out", out) == 0
    assert_same(load_checkpoint(out), load_checkpoint(run, "teacher"))
    assert out.stat().st_mode & 0o444 == tmp_path.stat().st_mode & 0o444, "as readable as its folder"


@pytest.mark.parametrize(("to", "ending"), [("original", ".pt"), ("safetensors", ".safetensors")])
def test_heads_that_shapes_do_not_tell_survive(tmp_path, to, ending):
    """Heads of 8 channels, 2 in the pooling: the file says so."""
    trainer = make_trainer(tiny_config(tmp_path, "run.max_steps=1"))
    trainer.fit()
    out = tmp_path / f"model{ending}"
    assert export("--checkpoint", trainer.plan.folder, "--to", to, "--out", out) == 0
    assert_same(load_checkpoint(out), load_checkpoint(trainer.plan.folder))
    assert load_checkpoint(out).config == trainer.config.model


def test_a_description_in_a_pt_file_is_held_against_its_weights(run, tmp_path):
    out, odd = tmp_path / "cosmos.pt", tmp_path / "odd.pt"
    assert export("--checkpoint", run, "--to", "original", "--out", out) == 0
    content = torch.load(out, weights_only=True)
    described = content["model"]
    for change, message in (
        ({"embed_dim": 32}, "weights do not fit this architecture"),
        ({"crossmodal": False}, "weights do not fit this architecture"),
        ({"pool_heads": 3}, "not a multiple of model.pool_heads=3"),
        ({"vision_cfg": {**described["vision_cfg"], "layers": 10**9}}, "it describes a model of"),
        ({"vision_cfg": [described] * 3}, "does not say what model its weights are of"),
        ({1: 1}, "does not say what model its weights are of"),
        ({"more": 1}, "more not supported"),
    ):
        torch.save({**content, "model": described | change}, odd)
        with pytest.raises(UserError, match=message):
            load_checkpoint(odd)
    for other in (content["teacher"], {"vision_cfg": "theirs"}, "ViT-B-16"):  # what other programs keep there
        torch.save({**content, "model": other}, odd)
        assert_same(load_checkpoint(odd), load_checkpoint(run))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert export(*arguments) == 2
    shown = capsys.readouterr().err
    assert len(shown.strip().splitlines()) == 1, shown
    return shown


def test_what_is_there_stays_unless_told(run, tmp_path, capsys):
    out = tmp_path / "cosmos.pt"
    out.write_text("precious")
    assert "exists already" in refused(capsys, "--checkpoint", run, "--to", "original", "--out", out)
    assert out.read_text() == "precious"
    assert export("--checkpoint", run, "--to", "original", "--out", out, "--overwrite") == 0
    assert_same(load_checkpoint(out), load_checkpoint(run))
    assert [path.name for path in tmp_path.iterdir()] == ["cosmos.pt"]


def test_mistakes_are_told_in_one_line_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "folder.pt").mkdir()
    absent = tmp_path / "absent"
    for to, out, weights, message in (
        ("original", "absent/cosmos.pt", "both", "does not exist: make it"),
        ("original", "cosmos.safetensors", "both", "--to original writes a .pt file"),
        ("safetensors", "cosmos.pt", "teacher", "--to safetensors writes a .safetensors file"),
        ("original", "folder.pt", "both", "is a folder"),
        ("safetensors", "a.safetensors", "both", "--to safetensors holds one model"),
        ("original", "cosmos.pt", "both", "absent does not exist"),
    ):
        arguments = ("--checkpoint", absent, "--weights", weights, "--to", to, "--out", tmp_path / out)
        assert message in refused(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt"]


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("checkpoint", "out"),
    [("x" * 300, "a"), (LONG, "a"), (None, LONG), ("absent", f"{LONG}/a"), (None, "x" * 255)],
    ids=["name", "path", "out", "parent", "name aside"],
)
def test_names_that_are_too_long(run, tmp_path, capsys, checkpoint, out):
    """The last is allowed itself, but not the longer one that the folder is written under."""
    source = tmp_path / checkpoint if checkpoint else run
    message = refused(capsys, "--checkpoint", source, "--to", "open_clip", "--out", tmp_path / out)
    assert "File name too long" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["checkpoint", "checkpoint/checkpoints", "out", "out/within"])
def test_folders_that_may_not_be_entered(tmp_path, capsys, monkeypatch, place):
    """The user of the tests may enter all folders."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out" / "within"
    checkpoint.mkdir()
    out.mkdir(parents=True)
    stat = Path.stat

    def forbidden(path: Path, **options: Any) -> os.stat_result:
        if path == tmp_path / place:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", forbidden)
    message = refused(capsys, "--checkpoint", checkpoint, "--to", "open_clip", "--out", out, "--overwrite")
    assert "Permission denied" in message


def test_the_working_directory_is_not_replaced(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (".", tmp_path):
        message = refused(capsys, "--checkpoint", run, "--to", "open_clip", "--out", out, "--overwrite")
        assert "is the working directory" in message
    assert tmp_path.is_dir()


def test_what_a_symbolic_link_stands_for_is_replaced(run, tmp_path):
    """No part of it is left beside the link, nor beside the folder."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "clip").symlink_to(tmp_path / "disk" / "clip")
    arguments = ("--checkpoint", run, "--to", "open_clip", "--overwrite", "--out")
    assert export(*arguments, tmp_path / "disk" / "clip") == 0
    former = (tmp_path / "disk" / "clip").stat().st_ino
    assert export(*arguments, tmp_path / "clip") == 0
    assert (tmp_path / "clip").is_symlink()
    assert (tmp_path / "disk" / "clip").stat().st_ino != former
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "disk"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["clip"]


def test_a_file_of_one_model_has_no_other(tmp_path, capsys):
    torch.save({"state_dict": create_model(tiny_config(tmp_path, *MODEL).model).state_dict()}, tmp_path / "one.pt")
    arguments = ("--checkpoint", tmp_path / "one.pt", "--to", "original", "--out", tmp_path / "out.pt")
    assert "does not hold a student and a teacher: choose --weights" in refused(capsys, *arguments)
    assert export(*arguments, "--weights", "student") == 0
    assert list(torch.load(tmp_path / "out.pt", weights_only=True)) == ["epoch", "name", "model", "student"]


def test_damage_is_found_before_anything_is_written(run, tmp_path, capsys, caplog):
    """A changed byte among the weights loads well: only the manifest tells."""
    newest, before = reversed(list_checkpoints(run / "checkpoints"))
    file, out = newest / "teacher.safetensors", tmp_path / "out.safetensors"
    whole = file.read_bytes()
    expected = load_checkpoint(before)
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        message = refused(capsys, "--checkpoint", newest, "--to", "safetensors", "--out", out)
        assert "teacher.safetensors has changed since it was written" in message
        assert not list(tmp_path.iterdir())
        assert export("--checkpoint", run, "--to", "safetensors", "--out", out) == 0
        assert "trying the one before it" in caplog.text
        assert_same(load_checkpoint(out), expected)
    finally:
        file.write_bytes(whole)


def test_a_run_whose_checkpoints_are_all_damaged(run, tmp_path, capsys):
    """To start anew is advice for `train` alone."""
    config = tiny_config(tmp_path, *MODEL)
    shutil.copytree(run, tmp_path / config.name)
    for folder in list_checkpoints(tmp_path / config.name / "checkpoints"):
        (folder / "manifest.json").unlink()
    arguments = ("--checkpoint", tmp_path / config.name, "--to", "original", "--out", tmp_path / "out.pt")
    assert refused(capsys, *arguments).endswith("is damaged: restore one\n")
    with pytest.raises(UserError, match=r"restore one, or start anew with --overwrite$"):
        plan_run(config, "auto")


@pytest.mark.parametrize(("to", "ending"), [("original", ".pt"), ("safetensors", ".safetensors"), ("torch_export", "")])
def test_a_full_disk_leaves_nothing(run, tmp_path, capsys, monkeypatch, to, ending):
    """The disk takes 8 KiB a file."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        message = refused(capsys, "--checkpoint", run, "--to", to, "--out", tmp_path / f"out{ending}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "could not be written" in message
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_nothing_under_the_name(run, tmp_path):
    out = tmp_path / "out.pt"
    out.write_text("before")
    child = os.fork()
    if not child:  # dies where all is written and nothing is renamed
        exporting.fsync_path = lambda _: os._exit(9)
        export("--checkpoint", run, "--to", "original", "--out", out, "--overwrite")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert out.read_text() == "before"
