"""The command line: start-up, mistakes, exit statuses, dry run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from cosmos_fast.cli.lazy import LazyGroup
from cosmos_fast.cli.main import command, run
from cosmos_fast.config import DataConfig, SourceConfig, dump_config, load_config
from cosmos_fast.data.loader import build_loader
from cosmos_fast.engine.estimate import activation_values, estimate
from cosmos_fast.model import create_model
from cosmos_fast.model.compute import apply_compute
from cosmos_fast.recipes import RECIPES, get_recipe
from cosmos_fast.utils.errors import UserError
from tests.ranks import environment
from tests.tiny_run import make_batch, tiny_config


def test_help_and_version_do_not_import_torch() -> None:
    program = (
        "import sys; from cosmos_fast.cli.main import command, run; run(command, sys.argv[1:]);"
        "sys.exit(3 if 'torch' in sys.modules or 'pydantic' in sys.modules else 0)"
    )
    for arguments in (["--help"], ["--version"], ["data", "--help"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_train_help_and_recipes_do_not_import_torch() -> None:
    program = (
        "import sys; from cosmos_fast.cli.main import command, run; run(command, sys.argv[1:]);"
        "sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    for arguments in (["train", "--help"], ["train", "--list-recipes"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_only_commands_that_exist_are_listed(capsys) -> None:
    assert run(command, ["--help"]) == 0
    listed = capsys.readouterr().out
    assert "train" in listed
    group = LazyGroup("x", package="cosmos_fast.cli", summaries={"train": "here", "frobnicate": "not here"})
    assert group.list_commands(click.Context(group)) == ["train"]
    assert run(group, ["frobnicate"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --recipe"),
        (["--recipe", "demo", "--config", "x.yaml"], "give one of --recipe"),
        (["--recipe", "dmo"], "did you mean 'demo'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--recipe", "demo", "--set", "lr=1"], "did you mean 'optimizer.lr'"),
        (
            ["--recipe", "demo", "--set", "data.train=/nowhere/x", "--set", "evaluate.data=null"],
            "data.train: data source '/nowhere/x'",
        ),
        (["--recipe", "demo", "--set", "evaluate.data=/nowhere/held"], "evaluate.data: data source '/nowhere/held'"),
        (["--recipe", "demo"], "make it with `cosmos-fast data synth --out data/demo`"),
        (["--recipe", "demo", "--set", "data.train=[]", "--set", "evaluate.data=null"], "data.train is empty"),
        (["--recipe", "demo", "--set", "run.device=tpu"], "run.device is 'tpu'"),
        (["--recipe", "demo", "--set", "run.device=cuda:99"], "CUDA devices: use cpu"),
        (["--recipe", "demo", "--resume", "/nowhere"], "checkpoint /nowhere does not exist"),
        (["--recipe", "demo", "--resume", "--overwrite"], "give one of them"),
    ],
)
def test_mistake_is_one_line_and_status_2_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capfd
) -> None:
    monkeypatch.chdir(tmp_path)
    out_dir = tmp_path / "runs"
    status = run(command, ["train", *arguments, "--set", f"run.out_dir={out_dir}"])
    lines = capfd.readouterr().err.splitlines()
    assert status == 2
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert message in errors[0]
    assert lines[-1] == errors[0]
    assert not out_dir.exists()


def test_the_proposed_data_source_can_be_pasted_into_a_shell() -> None:
    with pytest.raises(UserError) as caught:
        build_loader(DataConfig(), image_size=32, context_length=16, seed=0, batch_size=1)
    words = shlex.split(str(caught.value).partition("e.g. ")[2])
    assert words == ["--set", "data.train=shards/*.tar"]
    assert load_config(get_recipe("demo"), words[1:]).data.train == (SourceConfig(path="shards/*.tar"),)


def test_resume_from_another_directory_names_the_run_folder(tmp_path: Path, monkeypatch, capfd) -> None:
    """A stored run.out_dir that is relative would start from scratch in another folder."""
    own, elsewhere = tmp_path / "my runs" / "demo", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (own / "checkpoints" / "step_00000002").mkdir(parents=True)
    config = load_config(get_recipe("demo"), ["run.out_dir=my runs", "name=demo", "data.train=none", "run.device=cpu"])
    (own / "config.yaml").write_text(dump_config(config))

    def resume(*settings: str) -> str:
        changes = [word for setting in settings for word in ("--set", setting)]
        assert run(command, ["train", "--config", str(own / "config.yaml"), "--resume", *changes]) == 2
        return capfd.readouterr().err

    monkeypatch.chdir(elsewhere)
    there = elsewhere / "my runs" / "demo"
    error = resume().splitlines()[-1]
    assert error.startswith(f"error: {own}/config.yaml is of the run in {own}, but from here its settings name {there}")
    assert not list(elsewhere.iterdir())
    setting = shlex.split(error.partition("--set ")[2])
    from_there, other_run = resume(*setting), resume("name=other")
    monkeypatch.chdir(tmp_path)
    for said in (from_there, other_run, resume()):
        assert "is of the run in" not in said
    own.rename(own.with_name("old"))
    own = own.with_name("old")
    assert resume().splitlines()[-1].endswith(f"--set run.out_dir='{tmp_path}/my runs' --set name=old")


def test_half_a_launcher_is_refused(monkeypatch, capfd) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(command, ["train", "--recipe", "demo"]) == 2
    assert "start the run with torchrun or deepspeed" in capfd.readouterr().err


def test_printing_is_for_one_process(monkeypatch, capfd) -> None:
    for name, value in environment(1, 2, 1).items():
        monkeypatch.setenv(name, value)
    assert run(command, ["train", "--recipe", "demo", "--dry-run", "--local_rank=1"]) == 2
    assert "--dry-run works on one process: start it without a launcher" in capfd.readouterr().err


def test_statuses_of_other_ends(monkeypatch, capfd) -> None:
    @click.command()
    @click.argument("how")
    def end(how: str) -> None:
        if how == "interrupt":
            raise KeyboardInterrupt
        raise UserError("wrong")

    assert run(end, ["interrupt"]) == 130
    assert run(end, ["--unknown"]) == 2
    capfd.readouterr()
    assert run(end, ["error"]) == 2
    assert capfd.readouterr().err == "error: wrong\n"
    monkeypatch.setenv("COSMOS_DEBUG", "1")
    assert run(end, ["error"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_an_error_is_one_line_whatever_names_it_tells(capfd) -> None:
    @click.command()
    def end() -> None:
        raise UserError("a\nb\x1b[31m\u2028c\u202e is no ünal\u3000😀")

    assert run(end, []) == 2
    assert capfd.readouterr().err == "error: a\\nb\\x1b[31m\\u2028c\\u202e is no ünal\u3000😀\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("length", [1, 100_000])
def test_output_to_a_full_disk_is_one_line(length: int, unbuffered: str) -> None:
    program = (
        "import sys, click; from cosmos_fast.cli.main import run;"
        "sys.exit(run(click.Command('end', callback=lambda: print(int(sys.argv[1]) * 'x')), []))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, str(length)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    line = "error: the output cannot be written (No space left on device): make room, or write it elsewhere\n"
    assert (done.returncode, done.stderr) == (2, line)


def test_unexpected_errors_keep_their_traceback() -> None:
    @click.command()
    def end() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(end, [])


def test_list_recipes(capsys) -> None:
    assert run(command, ["train", "--list-recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)


@pytest.mark.parametrize("recipe", ["demo", "cc12m_vit_b_16"])
def test_dry_run_prints_a_config_that_loads_and_touches_nothing(
    recipe: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(command, ["train", "--recipe", recipe, "--set", "optimizer.lr=3e-4", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert load_config(yaml.safe_load(out)) == load_config(get_recipe(recipe), ["optimizer.lr=3e-4"])
    assert list(tmp_path.iterdir()) == []
    assert "compute              defaults" in out
    if recipe == "cc12m_vit_b_16":
        assert "parameters           152.4 M" in out
        assert f"steps                {32 * 10_010_225 // 4096}, 32.00 epochs" in out
        assert "4096 on 128 ranks" in out


def test_dry_run_says_what_this_machine_cannot_do(capsys) -> None:
    settings = ["--set=compute={cuda_graphs: true, checkpoint_activations: mlp}", "--set=run.device=cpu"]
    assert run(command, ["train", "--recipe", "demo", *settings, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "compute              checkpoint_activations=mlp, cuda_graphs=True" in out
    assert "not on this machine: compute.cuda_graphs=true: CUDA graphs need a GPU, this run is on cpu" in out


@pytest.mark.parametrize("recompute", ["none", "mlp", "blocks"])
def test_memory_estimate_follows_what_autograd_keeps(recompute: str, tmp_path: Path) -> None:
    import torch

    config = tiny_config(
        tmp_path,
        f"compute.checkpoint_activations={recompute}",
        "model.vision={image_size: 48, patch_size: 8, width: 64, layers: 4, head_width: 32}",
        "model.text={context_length: 32, vocab_size: 64, width: 64, heads: 2, layers: 4}",
        "data.views.local_image_size=24",
    )
    model = create_model(config.model)
    apply_compute(model, config.compute, torch.device("cpu"))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    batch = make_batch(config, 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch.images, batch.texts)
    measured = sum(size for size, _ in kept.values())
    assert 0.7 < 4 * 4 * activation_values(config.model, config.data.views, recompute) / measured < 1.4
    needs = estimate(config, "fp32")
    assert needs.parameters == sum(p.numel() for p in model.parameters())
    assert needs.total_bytes == 20 * needs.parameters + needs.activations_bytes
    assert estimate(config, "bf16").activations_bytes * 2 == needs.activations_bytes
