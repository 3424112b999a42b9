"""`data prepare` again and again: after a kill, a full disk, more downloads; and one line for every mistake."""

from __future__ import annotations

import errno
import os
import signal
import tarfile
from pathlib import Path

import pytest

from cosmos_fast.cli.main import command, run
from cosmos_fast.data import pool
from cosmos_fast.data.shard_files import locked
from tests.downloads import download_members, dreamlip, prepared_records, shards_of, write_download, write_dreamlip
from tests.held import kill_where_held
from tests.shards import write_tar


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_dreamlip(tmp_path / "cc3m_3long_3short_1raw_captions_url.csv", range(20))


def test_killed_half_way_the_same_command_completes_it_byte_for_byte(tmp_path: Path) -> None:
    table = write_dreamlip(tmp_path / "t.csv", range(50))
    images = write_download(tmp_path / "images", (5,) * 10)
    kill_where_held(
        tmp_path / "held",
        dreamlip(table, images, tmp_path / "broken", "--workers=2"),
        "cosmos_fast.data.prepare.shard",
        "find_record",
        "arguments[0].key in ('000060003', '000070003')",  # in the middle of the seventh and the eighth shard
        processes=2,
    )
    assert len(list((tmp_path / "broken").glob("*.tmp"))) == 2
    (tmp_path / "broken" / "00009.tar.tmp").write_bytes(b"left by an earlier kill")
    reported = {path.stem for path in (tmp_path / "broken" / ".prepare").glob("0*.json")}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "broken").glob("*.tar") if path.stem in reported}
    named = shards_of(tmp_path / "broken")
    assert len(reported) == 6
    assert run(command, dreamlip(table, images, tmp_path / "broken")) == 0
    assert run(command, dreamlip(table, images, tmp_path / "whole")) == 0
    assert shards_of(tmp_path / "broken") == shards_of(tmp_path / "whole")
    assert len(shards_of(tmp_path / "whole")) == 10
    assert named.items() <= shards_of(tmp_path / "whole").items()  # what had its name was whole
    assert {path: path.stat().st_mtime_ns for path in before} == before  # kept, not written again
    assert not list((tmp_path / "broken").rglob("*.tmp"))


def test_complete_shards_stay_and_new_or_changed_downloads_are_added(
    tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = write_download(tmp_path / "images", (3, 3)), tmp_path / "out"
    assert run(command, dreamlip(table, images, out)) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(command, dreamlip(table, images, out)) == 0
    assert "6 samples in 2 shards (complete already, nothing to do)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    write_tar(images / "00001.tar", download_members(3, "000010000"))
    write_tar(images / "00002.tar", download_members(7, "000020000"))
    (out / "00000.tar").write_bytes((out / "00000.tar").read_bytes()[:5120])
    assert run(command, dreamlip(table, images, out)) == 0
    assert "5 samples in 3 shards (3 made now)" in capsys.readouterr().out
    assert list(prepared_records(out)) == ["000000000", "000000001", "000000002", "000010000", "000020000"]


def test_files_that_are_not_its_own_are_left_alone(
    tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = write_download(tmp_path / "images", (3,)), tmp_path / "out"
    foreign = [out / name for name in (".notes.tmp", ".thesis.json.tmp", ".thesis.json.0123abcd.tmp")]
    (out / "00000.tar.tmp").mkdir(parents=True)
    for file in foreign:
        file.write_text("mine")
    assert run(command, dreamlip(table, images, out)) == 2
    assert "holds shards but no prepare.json" in capsys.readouterr().err
    (out / "00000.tar.tmp").rmdir()
    assert run(command, dreamlip(table, images, out)) == 0
    (out / "folder.tar.tmp").mkdir()
    foreign += [out / "other.tar.tmp", out / ".prepare" / ".notes.tmp"]
    own = [out / ".prepare.json.0123abcd.tmp", out / ".prepare" / ".captions.npy.0123abcd.tmp", out / "00000.tar.tmp"]
    for file in [*foreign, *own]:
        file.write_text("left")
    assert run(command, dreamlip(table, images, out)) == 0
    assert all(file.is_file() for file in foreign)
    assert not any(file.exists() for file in own)
    assert (out / "folder.tar.tmp").is_dir()


def test_a_truncated_download_gives_what_is_whole_of_it(
    tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_download(tmp_path / "images", (4, 2))
    first = images / "00000.tar"
    with tarfile.open(first) as tar:
        offset = tar.getmember("000000002.json").offset_data
    first.write_bytes(first.read_bytes()[: offset + 5])
    assert run(command, dreamlip(table, images, tmp_path / "out")) == 0
    assert "left out 1 x truncated shard" in capsys.readouterr().out
    assert list(prepared_records(tmp_path / "out")) == ["000000000", "000000001", "000010000", "000010001"]


@pytest.mark.parametrize(("file", "kept"), [("captions.bin", []), ("00001.tar.tmp", ["00000.tar"])])
def test_full_disk_is_one_line_and_leaves_nothing_broken(
    tmp_path: Path,
    table: Path,
    file: str,
    kept: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, out = write_download(tmp_path / "images", (3, 3)), tmp_path / "out"

    def no_room(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        assert run(command, dreamlip(table, images, out)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: cannot write")
    assert "No space left on device; mend that and run the same command again" in error
    assert "\n" not in error
    assert list(shards_of(out)) == kept
    assert not list(out.rglob("*.tmp"))
    assert bool(kept) == bool(list(out.rglob("captions.bin")))  # made once
    assert run(command, dreamlip(table, images, out)) == 0
    assert len(prepared_records(out)) == 6


def test_a_killed_worker_is_told(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_download(tmp_path / "images", (2, 2))
    with pytest.raises(ValueError, match="a worker process was killed"):
        pool.run_in_pool(_die, [1, 2], 2, lambda units: None)
    with locked(images):
        assert run(command, dreamlip(table, images, tmp_path / "out")) == 0  # a lock is for writers only
    with locked(tmp_path / "out"):
        assert run(command, dreamlip(table, images, tmp_path / "out")) == 2
    assert "another process is writing" in capsys.readouterr().err


def _die(job: int, progress: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"table": "none.csv"}, "caption table '{}/none.csv' is not there"),
        (
            {"table": "other.csv"},
            "none of 4 images looked at has captions (the first: not in the caption table https://images.example.org/000000",
        ),
        ({"table": "empty.csv"}, "no row has captions (it is empty)"),
        ({"table": "wrong.csv"}, "is no table of dreamlip: it needs a column 'Image Path' and has a, b"),
        ({"images": "none"}, "shard {}/none is missing"),
        ({"images": "empty"}, "holds neither .tar shards nor images"),
        ({"images": "https://example.org/0.tar"}, "images are prepared from local files"),
        ({"images": "pipe:cat x.tar"}, "images are prepared from local files"),
        ({"out": "images"}, "is where the images are: choose another directory"),
        ({"out": "foreign"}, "holds shards but no prepare.json"),
        ({"extra": "--key-column=x"}, "--key-column names the column for --join key"),
        ({"extra": "--join=name"}, "Invalid value for '--join'"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    tmp_path: Path, change: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dreamlip(tmp_path / "table.csv", range(4))
    write_dreamlip(tmp_path / "other.csv", range(100, 110))
    write_dreamlip(tmp_path / "empty.csv", [])
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    write_download(tmp_path / "images", (2, 2))
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "foreign" / "0.tar", {"a.txt": b"x"})
    before = sorted(tmp_path.rglob("*"))
    images = change.get("images", "images")
    where = {name: tmp_path / change.get(name, f"{name}.csv" if name == "table" else name) for name in ("table", "out")}
    arguments = dreamlip(where["table"], Path("x"), where["out"], *([change["extra"]] if "extra" in change else []))
    arguments[arguments.index("x")] = images if ":" in images else str(tmp_path / images)
    assert run(command, arguments) == 2
    error = capsys.readouterr().err.strip()
    assert told.format(tmp_path) in error
    assert "extra" in change or "\n" not in error
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert [path for path in left if path.name not in (".prepare", "out")] == []


def test_other_captions_in_the_same_directory_are_refused(
    tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = write_download(tmp_path / "images", (2,)), tmp_path / "out"
    assert run(command, dreamlip(table, images, out)) == 0
    before = shards_of(out)
    other = write_dreamlip(tmp_path / "other.csv", range(5))
    assert run(command, dreamlip(other, images, out)) == 2
    assert run(command, ["data", "prepare", "img2dataset", str(images), "--out", str(out)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2
    assert "holds shards made otherwise (captions [['cc3m_3long" in errors[0]
    assert "layout dreamlip there, img2dataset asked" in errors[1]
    assert shards_of(out) == before


def test_another_download_under_the_same_names_does_not_replace_shards(
    tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = write_download(tmp_path / "images", (2, 1)), tmp_path / "out"
    other = write_download(tmp_path / "other", (3, 3))
    assert run(command, dreamlip(table, images, out)) == 0
    before = shards_of(out)
    assert run(command, dreamlip(table, other, out)) == 2
    error = capsys.readouterr().err
    assert f"{out}/00000.tar is made of {images}/00000.tar, not of {other}/00000.tar" in error
    assert error.count("\n") == 1
    assert shards_of(out) == before
    moved = images.rename(tmp_path / "moved")
    assert run(command, dreamlip(table, moved, out)) == 0
    assert "complete already" in capsys.readouterr().out


def test_a_download_without_any_caption_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_download(tmp_path / "images", (2,))
    assert run(command, ["data", "prepare", "img2dataset", str(images), "--out", str(tmp_path / "out")]) == 2
    assert "no image has a caption (2 x missing or empty caption (00000.tar:000000000))" in capsys.readouterr().err
