"""docs/scale.md: its commands run, or are understood; its figures are those of the plan."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cosmos_fast.cli import train
from cosmos_fast.cli.main import command, run
from cosmos_fast.engine.plan import Layout
from cosmos_fast.engine.plan.memory import state_bytes
from cosmos_fast.engine.plan.traffic import loss_transfers, received_bytes
from cosmos_fast.recipes import get_recipe

TEXT = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
LINES = "".join(re.findall(r"^```\n(.*?)^```", TEXT, re.M | re.S)).splitlines()
MODULE = "cosmos_fast.cli.train"


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("cosmos-fast ")])
def test_a_command_of_the_page_runs(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = shlex.split(line)[1:]
    assert arguments[0] in ("plan", "launch")  # neither starts or writes anything
    assert run(command, arguments) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", [line for line in LINES if MODULE in line and not line.startswith("cosmos-fast ")])
def test_train_understands_what_launchers_are_given(line: str) -> None:
    words = shlex.split(line)
    given = train.command.make_context("train", words[words.index(MODULE) + 1 :]).params
    config = train.resolve_config(given["recipe"], given["config_file"], given["overrides"])
    assert config.data.train


def test_every_command_of_the_page_is_tried() -> None:
    assert sum(line.startswith("cosmos-fast plan ") for line in LINES) == 3
    assert {line.split()[2] for line in LINES if line.startswith("cosmos-fast launch ")} == {
        "torchrun",
        "deepspeed",
        "slurm",
    }
    assert sum(MODULE in line for line in LINES) == 4


def test_figures_of_the_page() -> None:
    config, parameters = get_recipe("cc12m_vit_b_16"), 152_398_338
    alone = state_bytes(config, parameters, Layout(ranks=1, stage=0, batch_size=1, precision="fp32"))
    found = re.search(r"ViT-B has (\d+) M parameters, ([\d.]+) GiB", TEXT)
    assert found is not None
    assert (round(parameters / 1e6), round(sum(alone.values()) / 2**30, 1)) == (int(found[1]), float(found[2]))
    shown = re.search(r"about ([\d.]+) kB a sample of G in 16 bits, (\d+) kB in fp32", TEXT)
    assert shown is not None
    for text, precision in zip(shown.groups(), ("bf16", "fp32"), strict=True):
        chosen = Layout(ranks=1024, stage=0, batch_size=32, precision=precision)
        size = received_bytes(loss_transfers(config, chosen), 1024) / chosen.global_batch / 1e3
        assert size == pytest.approx(float(text), rel=0.01)
