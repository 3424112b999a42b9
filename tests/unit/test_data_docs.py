"""docs/data.md, followed: its commands run, in order, from files in the published formats to trainings."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest

from cosmos_fast.cli.main import command, run
from tests.downloads import PIXELPROSE_HEADER, dreamlip_row, pixelprose_row, write_csv, write_download, write_dreamlip
from tests.tiny_run import TINY
from tests.web import serve

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
SMALL = (
    *(setting for setting in TINY if not setting.startswith("model.text")),
    "model.text={context_length: 16, width: 16, heads: 2, layers: 1}",
    "model.vision={image_size: 16, patch_size: 8, width: 16, layers: 1, head_width: 8}",
    "run.max_steps=2",
    "data.samples_per_epoch=null",
    "run.device=cpu",
    "data.workers=0",
)


def commands() -> list[list[str]]:
    """Of `cosmos-fast`, as a shell would split them."""
    text = DOCUMENT.read_text().split("## Prepare", 1)[1]
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("cosmos-fast ")]


def test_the_page_leads_from_published_files_to_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("cosmos_fast.cli.data.prepare.usable_cores", lambda: 1)  # starting processes takes seconds
    write_dreamlip(Path("cc3m_3long_3short_1raw_captions_url.csv"), range(12))
    write_download(Path("cc3m-images"), (5, 4))
    Path("pixelprose", "data").mkdir(parents=True)
    write_pixelprose(Path("pixelprose", "data"))
    write_download(Path("pixelprose-images"), (4, 3))
    write_download(Path("captioned-images"), (3,), caption="A cabin. A green roof.")
    ran = []
    with serve(tmp_path) as web:
        for arguments in commands():
            here = [word.replace("https://host", web.url).replace("00331", "00001") for word in arguments]
            if arguments[0] == "train" and "--dry-run" not in arguments:
                here += [f"--set={setting}" for setting in (*SMALL, *(["name=remote"] if here != arguments else []))]
            if arguments[2] == "pixelprose" and not list(Path("pixelprose/data").glob("*.parquet")):
                here[3] = "pixelprose/data/*.csv"  # without pyarrow
            status = run(command, here)
            assert status == 0, (here, capsys.readouterr().err)
            ran.append(" ".join(arguments[: 1 if arguments[0] != "data" else 3 if arguments[1] == "prepare" else 2]))
    assert set(ran) == {
        *(f"data prepare {name}" for name in ("dreamlip", "pixelprose", "img2dataset")),
        *(f"data {name}" for name in ("index", "verify", "inspect", "coverage")),
        "train",
    }
    metrics = list(Path("runs").rglob("metrics.jsonl"))
    assert len(metrics) == 2
    assert all(file.read_text().count('"kind": "train"') == 2 for file in metrics)


def test_the_list_of_urls_has_one_for_every_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of Python that the page gives; captions hold line breaks, which must not get into it."""
    monkeypatch.chdir(tmp_path)
    table = Path("cc3m_3long_3short_1raw_captions_url.csv")
    rows = [{**dreamlip_row(number), "raw_caption": "two\nlines, and a comma"} for number in range(3)]
    write_csv(table, list(rows[0]), rows)
    (line,) = re.findall(r'^python -c "(.*?)"$', DOCUMENT.read_text().replace("\\\n", ""), re.M)
    exec(line, {})
    lines = Path("cc3m_urls.csv").read_text().splitlines()
    assert list(csv.reader(lines)) == [["url"], *([row["Image Path"]] for row in rows)]
    assert len(lines) == 4


def write_pixelprose(folder: Path) -> None:
    rows = [pixelprose_row(number) for number in range(12)]
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        write_csv(folder / "vlm_captions_cc12m_00.csv", PIXELPROSE_HEADER, rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "vlm_captions_cc12m_00.parquet")
