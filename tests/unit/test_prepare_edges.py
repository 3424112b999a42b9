"""`data prepare` at its edges: members over a cap, inputs that change, work that was stopped between two steps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosmos_fast.cli.main import command, run
from cosmos_fast.data.prepare import downloads
from cosmos_fast.data.prepare import run as preparation
from cosmos_fast.utils.errors import UserError
from tests.downloads import (
    download_members,
    dreamlip,
    metadata,
    prepared_records,
    shards_of,
    write_download,
    write_dreamlip,
)
from tests.shards import picture, write_tar

Prepare = Callable[..., tuple[int, str]]


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Runs `data prepare dreamlip` over images/ into out/; (exit status, all that it prints)."""
    table = write_dreamlip(tmp_path / "table.csv", range(20))

    def call() -> tuple[int, str]:
        status = run(command, dreamlip(table, tmp_path / "images", tmp_path / "out"))
        return status, "".join(capsys.readouterr())

    return call


def test_members_over_a_cap_are_left_out_before_they_are_read(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "DataConfig", lambda: SimpleNamespace(max_member_bytes=9000))
    members = {**download_members(0, "a"), **download_members(1, "b"), **download_members(2, "c")}
    members["b.json"] = json.dumps({**metadata(1, "b"), "exif": "x" * (1 << 20)}).encode()
    members["c.jpg"] = picture(2) + bytes(9000)
    write_tar(tmp_path / "images" / "0.tar", members)
    status, told = prepare()
    assert status == 0
    assert "left out 2 x member over the byte cap (0.tar:b)" in told
    assert list(prepared_records(tmp_path / "out")) == ["a"]


def test_a_table_with_a_byte_order_mark(tmp_path: Path, prepare: Prepare) -> None:
    table = tmp_path / "table.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    write_download(tmp_path / "images", (2,))
    assert prepare()[0] == 0


def test_later_shards_may_be_without_captions(tmp_path: Path, prepare: Prepare) -> None:
    """A download of which nothing has a caption is refused; a part of one is not, and its shard goes."""
    images, out = write_download(tmp_path / "images", (2, 2)), tmp_path / "out"
    assert prepare()[0] == 0
    write_tar(images / "00001.tar", download_members(500, "x"))
    write_tar(images / "00002.tar", download_members(501, "y"))
    status, told = prepare()
    assert status == 0
    assert "left out 2 x not in the caption table" in told
    assert list(shards_of(out)) == ["00000.tar"]


def test_a_download_that_still_runs_is_told(tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_download(tmp_path / "images", (2, 2))
    write = preparation.write_shard

    def grow(plan: Any, *more: Any) -> Any:
        report = write(plan, *more)
        if plan.unit.name == "00001":
            os.utime(plan.unit.path, ns=(0, plan.unit.path.stat().st_mtime_ns + 1))
        return report

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "write_shard", grow)
        status, told = prepare()
    assert status == 2
    assert (
        f"1 shards changed while they were read (is the download still running?), {images}/00001.tar the first" in told
    )
    assert prepare()[0] == 0


def test_work_that_was_stopped_leaves_its_captions_and_no_half_shard(
    tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_download(tmp_path / "images", (2, 2))
    out = tmp_path / "out"

    def stop(_: Any, plans: Sequence[Any], *__: Any) -> None:
        plans[1].aside.write_bytes(b"half")  # of a worker that was ended
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "run_in_pool", stop)
        assert prepare()[0] == 2
    assert not list(out.glob("*.tmp"))
    (out / "00000.tar.tmp").write_bytes(b"of one that was killed")
    (out / "00009.tar.tmp").write_bytes(b"of one that was killed")
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "build_store", lambda *_: pytest.fail("captions are read once more"))
        assert prepare()[0] == 0
    assert not list(out.glob("*.tmp"))
    assert len(prepared_records(out)) == 4
