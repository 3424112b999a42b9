"""docs/exchange.md and the README: their commands run, and their Python, as written."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos_fast import load_checkpoint
from cosmos_fast.cli import train
from cosmos_fast.cli.main import command, run
from cosmos_fast.exchange.formats import FORMATS
from cosmos_fast.recipes import get_recipe
from tests.tiny_run import make_trainer, tiny_config

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "exchange.md").read_text()
LINES = [shlex.split(line) for line in TEXT.splitlines() if line.startswith("cosmos-fast ")]
MODEL = get_recipe("demo").model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the run of the demo, and a photograph."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(Path("runs/demo"), "name=cosmos", "run.max_steps=1", "run.batch_size=2")
    make_trainer(replace(config, model=MODEL)).fit()
    Image.fromarray(np.zeros((20, 30, 3), dtype=np.uint8)).save("photo.jpg")
    return tmp_path


def python_of(text: str) -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    return block


def test_the_page_from_export_to_python(place, capsys):
    ran = []
    for _, name, *arguments in LINES:
        to = arguments[arguments.index("--to") + 1] if "--to" in arguments else ""
        if name == "export" and to not in ("onnx", "torch_export"):  # they take seconds, and have tests of their own
            assert run(command, [name, *arguments]) == 0, capsys.readouterr().err
        ran.append(to)
    assert set(FORMATS) <= set(ran)
    capsys.readouterr()
    exec(compile(python_of(TEXT), "exchange.md", "exec"), {})
    assert re.search(r"tensor\(\[\[ *-?\d", capsys.readouterr().out)
    for written in ("runs/demo/cosmos", "cosmos.pt", "student.safetensors"):
        assert load_checkpoint(written).config == MODEL
    assert load_checkpoint("cosmos_clip/open_clip_model.safetensors").config == replace(MODEL, crossmodal=False)


def test_the_page_names_every_format() -> None:
    assert re.findall(r"^\| `(\w+)` \|", TEXT, re.M) == list(FORMATS)


def test_training_understands_where_it_begins() -> None:
    (arguments,) = (line[2:] for line in LINES if line[1] == "train")
    given = train.command.make_context("train", arguments).params
    config = train.resolve_config(given["recipe"], given["config_file"], given["overrides"])
    assert (config.init.path, config.init.weights) == ("clip.safetensors", "teacher")


def test_the_readme_compares_a_photograph_with_texts(place, capsys):
    exec(compile(python_of((ROOT / "README.md").read_text()), "README.md", "exec"), {})
    assert re.search(r"tensor\(\[\[0\.\d+, 0\.\d+\]\]\)", capsys.readouterr().out)
