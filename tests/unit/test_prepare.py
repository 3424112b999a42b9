"""`cosmos-fast data prepare`: published tables and downloads into shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos_fast.cli.main import command, run
from cosmos_fast.data.records import parse_record
from tests.downloads import (
    PIXELPROSE_HEADER,
    download_members,
    dreamlip,
    dreamlip_row,
    dreamlip_sentences,
    open_prepared,
    pixelprose_row,
    prepared_records,
    shards_of,
    url_of,
    write_csv,
    write_download,
    write_dreamlip,
)
from tests.shards import picture, write_tar


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_dreamlip(tmp_path / "cc3m_3long_3short_1raw_captions_url.csv", range(20))


def test_dreamlip_captions_meet_their_images_by_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [dreamlip_row(number) for number in range(8)]
    rows[2] = dict.fromkeys(rows[2], "") | {"Image Path": url_of(2)}
    rows.append({**dreamlip_row(9), "Image Path": url_of(1)})
    table = write_csv(tmp_path / "cc3m.csv", list(rows[0]), rows)
    images = write_download(tmp_path / "images", (4, 2, 3))
    json_of = {number: download_members(number, "x")["x.json"] for number in (6, 7)}
    broken = {"000030000.jpg": b"", "000030000.json": json_of[6], "000030001.jpg": picture(7)}
    broken |= {"000030002.json": json_of[7], "000030003.jpg": picture(1), "000030003.json": b"{"}
    write_tar(images / "00003.tar", broken)
    out = tmp_path / "out"
    assert run(command, dreamlip(table, images, out)) == 0
    told = capsys.readouterr().out
    assert f"{out}: 7 samples in 3 shards (4 made now)" in told
    assert "left out 2 x missing json member" not in told
    for line in (
        "left out 1 x not in the caption table (00002.tar:000020002)",
        "left out 1 x missing json member (00003.tar:000030001)",
        "left out 1 x empty member (00003.tar:000030000)",
        "left out 1 x missing image member (00003.tar:000030002)",
        "left out 1 x wrong json (00003.tar:000030003)",
        "left out 1 x missing or empty caption (00000.tar:000000002)",
        "in the caption table 1 x row for an image that had one before",
    ):
        assert line in told
    found = prepared_records(out)
    assert found == {
        key: dreamlip_sentences(n) | {"url": url_of(n)} for key, n in zip(found, (0, 1, 3, 4, 5, 6, 7), strict=True)
    }
    assert list(found)[:4] == ["000000000", "000000001", "000000003", "000010000"]
    index = open_prepared(out)
    assert [index.read(i)["jpg"] for i in range(7)] == [picture(n) for n in (0, 1, 3, 4, 5, 6, 7)]
    assert not list(out.glob("**/captions*"))


def test_captions_meet_images_by_name(tmp_path: Path) -> None:
    rows = [{**dreamlip_row(number), "Image Path": f"{number:07d}/{number:09d}.jpg"} for number in range(6)]
    table = write_csv(tmp_path / "old.csv", list(rows[0]), rows)
    images = write_tar(tmp_path / "images" / "0.tar", {f"{n:09d}.jpg": picture(n) for n in range(9)}).parent
    assert run(command, dreamlip(table, images, tmp_path / "out", "--join=key")) == 0
    assert prepared_records(tmp_path / "out") == {f"{n:09d}": dreamlip_sentences(n) for n in range(6)}
    named = [{("name" if name == "Image Path" else name): value for name, value in row.items()} for row in rows]
    renamed = write_csv(tmp_path / "b.csv", list(named[0]), named)
    assert run(command, dreamlip(renamed, images, tmp_path / "b", "--join=key", "--key-column=name")) == 0
    assert shards_of(tmp_path / "b") == shards_of(tmp_path / "out")


def test_pixelprose_from_parquet_and_from_csv_is_the_same(tmp_path: Path) -> None:
    rows = [pixelprose_row(number) for number in range(12)]
    rows[3]["vlm_caption"] = None
    images = write_download(tmp_path / "images", (5, 4))
    csv = write_csv(tmp_path / "p.csv", PIXELPROSE_HEADER, rows)
    arguments = ["--images", str(images), "--workers=1"]
    assert run(command, ["data", "prepare", "pixelprose", str(csv), *arguments, "--out", str(tmp_path / "csv")]) == 0
    found = prepared_records(tmp_path / "csv")
    assert len(found) == 8
    assert found["000000002"] == {
        "original_caption": "Cabin no. 2",
        "caption": "This image displays: a cabin, number 2. It has a green roof.\nThe style is a photo.",
        "uid": f"{2:032x}",
        "url": url_of(2),
    }
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for part in range(2):
        name = tmp_path / f"vlm_captions_cc12m_{part:02d}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows[part * 6 : part * 6 + 6]), name)
    glob = str(tmp_path / "vlm_captions_*.parquet")
    assert run(command, ["data", "prepare", "pixelprose", glob, *arguments, "--out", str(tmp_path / "parquet")]) == 0
    assert shards_of(tmp_path / "parquet") == shards_of(tmp_path / "csv")


def test_a_download_with_its_own_captions(tmp_path: Path) -> None:
    columns = {name: value for name, value in dreamlip_row(0).items() if name != "Image Path"}
    members = download_members(0, "000000000", **columns)
    members |= download_members(1, "000000001", text="A cabin. A tree.", caption="A cabin. A tree.")
    members |= download_members(2, "000000002", original_caption="alt", caption="Dense one. Two.")
    members |= download_members(3, "000000003", longSV_captions=list("One. Two."))
    members |= {"000000004.webp": picture(4, file_format="WEBP"), "000000004.txt": b"Only text. More.", "README": b"x"}
    images = write_tar(tmp_path / "images" / "00000.tar", members).parent
    assert run(command, ["data", "prepare", "img2dataset", str(images), "--out", str(tmp_path / "out")]) == 0
    index = open_prepared(tmp_path / "out")
    assert prepared_records(tmp_path / "out") == {
        "000000000": dreamlip_sentences(0) | {"url": url_of(0)},
        "000000001": {"raw_caption": ["A cabin", "A tree"], "url": url_of(1)},
        "000000002": {"original_caption": "alt", "caption": "Dense one. Two.", "url": url_of(2)},
        "000000003": {"longSV_captions": ["One", "Two"], "url": url_of(3)},
        "000000004": {"raw_caption": ["Only text", "More"]},
    }
    assert sorted(index.members(4)) == ["json", "webp"]
    assert [len(parse_record(index.read(i)["json"]).sentences) for i in range(5)] == [11, 2, 3, 2, 2]


def test_metadata_of_a_shard_without_json_comes_from_its_parquet_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    images = write_tar(tmp_path / "i" / "00000.tar", {f"{n:09d}.jpg": picture(n) for n in range(3)}).parent
    rows = [{"url": url_of(n), "key": f"{n:09d}", "status": "success", "caption": f"One {n}. Two."} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), images / "00000.parquet")
    assert run(command, ["data", "prepare", "img2dataset", str(images), "--out", str(tmp_path / "out")]) == 0
    assert prepared_records(tmp_path / "out")["000000002"] == {"raw_caption": ["One 2", "Two"], "url": url_of(2)}


def test_folders_of_files_give_a_shard_each(tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cosmos_fast.data.prepare.downloads.FOLDER_IMAGES", 3)
    for folder, numbers in (("00000", range(4)), ("00001", range(4, 6))):
        (tmp_path / "files" / folder).mkdir(parents=True)
        for number in numbers:
            for name, data in download_members(number, f"{folder}{number:04d}", text="x").items():
                (tmp_path / "files" / folder / name).write_bytes(data)
    (tmp_path / "files" / "00000_stats.json").write_text("{}")
    assert run(command, dreamlip(table, tmp_path / "files", tmp_path / "out")) == 0
    assert list(shards_of(tmp_path / "out")) == ["00000_0000.tar", "00000_0001.tar", "00001.tar"]
    found = prepared_records(tmp_path / "out")
    assert [record["url"] for record in found.values()] == [url_of(n) for n in range(6)]


def test_shards_of_several_folders_keep_their_names_apart(tmp_path: Path, table: Path) -> None:
    write_download(tmp_path / "images" / "a", (2,))
    write_download(tmp_path / "images" / "b", (2,))
    assert run(command, dreamlip(table, tmp_path / "images" / "{a,b}", tmp_path / "out")) == 0
    assert list(shards_of(tmp_path / "out")) == ["a_00000.tar", "b_00000.tar"]
