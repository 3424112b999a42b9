"""docs/data.md, followed: its commands run, in order, from files in the published formats to a training."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cosmos_fast.cli.main import command, run
from tests.downloads import PIXELPROSE_HEADER, pixelprose_row, write_csv, write_download, write_dreamlip
from tests.tiny_run import TINY

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
SMALL = (
    *(setting for setting in TINY if not setting.startswith("model.text")),
    "model.text={context_length: 16, width: 16, heads: 2, layers: 1}",
    "model.vision={image_size: 16, patch_size: 8, width: 16, layers: 1, head_width: 8}",
    "run.max_steps=2",
    "run.device=cpu",
    "data.workers=0",
)


def commands() -> list[list[str]]:
    """Of `cosmos-fast`, in the sections from Prepare to Train, as a shell would split them."""
    text = DOCUMENT.read_text().split("## Prepare", 1)[1]
    text = text[: text.index("\n## ", text.index("## Train"))] if "\n## " in text.split("## Train")[1] else text
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("cosmos-fast ")]


def test_the_page_leads_from_published_files_to_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dreamlip(Path("cc3m_3long_3short_1raw_captions_url.csv"), range(12))
    write_download(Path("cc3m-images"), (5, 4))
    Path("pixelprose", "data").mkdir(parents=True)
    write_pixelprose(Path("pixelprose", "data"))
    write_download(Path("pixelprose-images"), (4, 3))
    write_download(Path("captioned-images"), (3,), caption="A cabin. A green roof.")
    ran = set()
    for arguments in commands():
        if arguments[0] == "train" and "--dry-run" not in arguments:
            arguments = [*arguments, *(f"--set={setting}" for setting in SMALL)]
        if arguments[:3] == ["data", "prepare", "pixelprose"] and not list(Path("pixelprose/data").glob("*.parquet")):
            arguments[3] = "pixelprose/data/*.csv"  # without pyarrow
        status = run(command, arguments)
        assert status == 0, (arguments, capsys.readouterr().err)
        depth = 1 if arguments[0] != "data" else 3 if arguments[1] == "prepare" else 2
        ran.add(" ".join(arguments[:depth]))
    assert ran >= {
        "data prepare dreamlip",
        "data prepare pixelprose",
        "data prepare img2dataset",
        "data index",
        "train",
    }
    metrics = list(Path("runs").rglob("metrics.jsonl"))
    assert len(metrics) == 1
    assert metrics[0].read_text().count('"kind": "train"') == 2


def write_pixelprose(folder: Path) -> None:
    rows = [pixelprose_row(number) for number in range(12)]
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        write_csv(folder / "vlm_captions_cc12m_00.csv", PIXELPROSE_HEADER, rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "vlm_captions_cc12m_00.parquet")
