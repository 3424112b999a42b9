"""What this machine cannot do, asked for at the command line: one line that says what to change, and status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosmos_fast.cli.main import command, run
from cosmos_fast.model import fp8
from cosmos_fast.utils import nvidia_apex
from tests.shards import write_shards
from tests.tiny_run import TINY

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *TINY,
    "model.text={context_length: 77, vocab_size: 49408, width: 16, heads: 2, layers: 2}",
    "run.device=cpu",
    "run.max_steps=2",
    "data.workers=0",
)
# What is asked for, and parts of what is said. Triton is told apart below: tests run its interpreter.
REFUSED = {
    "compute.attention=varlen": ("attention: backend 'varlen' was asked for", "no CUDA device", "auto takes what runs"),
    "compute.attention=flash": ("attention: backend 'flash' was asked for", "no CUDA device", "auto takes what runs"),
    "compute.attention=xformers": ("backend 'xformers' was asked for", "no CUDA device", "auto takes what runs"),
    "compute.cuda_graphs=true": ("CUDA graphs need a GPU, this run is on cpu", "set compute.cuda_graphs=false"),
    "compute.compile=true": ("needs a compiler, but no-such-compiler is not found", "set compute.compile=false"),
    "compute.layer_norm=apex": ("compute.layer_norm=apex: apex is not installed; use torch",),
    "compute.optimizer=apex": ("compute.optimizer=apex: apex is not installed; use fused",),
    "compute.linear=fp8": ("8-bit products run on GPUs", "this run is on cpu", "set compute.linear=plain"),
    "compute={linear: fp8, fp8_backend: te}": ("8-bit products run on GPUs", "set compute.linear=plain"),
    "compute.attention=fast": ("'compute.attention' is 'fast'",),
    "compute.compile=perhaps": ("'compute.compile' is 'perhaps'",),
    "run.precision=fp8": ("'run.precision' is 'fp8'",),
    "compute={cuda_graphs: true, compile: true, layer_norm: triton}": ("set compute.layer_norm=torch",),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), counts=(6,))


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_apex, "why_unusable", lambda name: f"{name} is not installed")
    monkeypatch.setattr(fp8, "why_unusable", lambda name: f"{name} is not installed")
    monkeypatch.setenv("CXX", "no-such-compiler")


def arguments(shards: Path, out_dir: Path, setting: str) -> list[str]:
    settings = (*SETTINGS, f"run.out_dir={out_dir}", f"data.train={shards}", setting)
    return ["train", "--recipe=demo", *(f"--set={one}" for one in settings)]


def error_of(lines: list[str]) -> str:
    """The one line that is an error, the last one."""
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:], lines
    return errors[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="some of it runs on a GPU")
@pytest.mark.parametrize("setting", REFUSED)
def test_train_refuses_in_one_line(setting: str, shards: Path, tmp_path: Path, capfd) -> None:
    assert run(command, arguments(shards, tmp_path / "runs", setting)) == 2
    said = error_of(capfd.readouterr().err.splitlines())
    for part in REFUSED[setting]:
        assert part in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("way", [["--profile"], ["--find-batch-size"], ["--find-batch-size", "--memory-limit=8"]])
def test_so_does_every_way_to_train(way: list[str], shards: Path, tmp_path: Path, capfd) -> None:
    assert run(command, [*arguments(shards, tmp_path / "runs", "compute.cuda_graphs=true"), *way]) == 2
    assert "set compute.cuda_graphs=false" in error_of(capfd.readouterr().err.splitlines())
    assert not (tmp_path / "runs").exists()


TWICE = """
import sys
from cosmos_fast.cli.main import command, run
options, arguments = sys.argv[1].split(), sys.argv[2:]
print([run(command, [*arguments, f"--set=compute.{option}=triton"]) for option in options])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on a GPU")
def test_triton_without_a_gpu(shards: Path, tmp_path: Path) -> None:
    """In a process of its own: in this one its interpreter is on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    program = [sys.executable, "-c", TWICE, "attention layer_norm"]
    ended = subprocess.run(
        [*program, *arguments(shards, tmp_path / "runs", "run.max_steps=2")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ended.stdout.splitlines()[-1:] == ["[2, 2]"], ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 2
    for line, instead in zip(said, ("auto takes what runs here", "set compute.layer_norm=torch"), strict=True):
        assert "backend 'triton' was asked for but cannot run: no CUDA device" in line
        assert instead in line
    assert not (tmp_path / "runs").exists()
