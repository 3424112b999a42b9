"""Sources of other kinds than files and web servers: what fsspec reads, file URLs, shell commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cosmos_fast.data import faults, storage
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.sources import find_shards
from cosmos_fast.data.storage import RemoteShard
from cosmos_fast.utils.errors import UserError
from tests.remote import check, opened, patient
from tests.shards import write_shards


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(folder))
    monkeypatch.setattr(storage, "_FIRST_WAIT_S", 0.01)
    return folder


@pytest.mark.parametrize("like_s3fs", [False, True])
def test_whatever_fsspec_reads(tmp_path: Path, like_s3fs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    read = MemoryFileSystem.cat_file

    def cat_file(self: Any, path: str, version_id: str | None = None, start: Any = None, end: Any = None) -> bytes:
        assert version_id is None
        return read(self, path, start, end)

    if like_s3fs:  # which has its arguments in another order
        monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    for shard in sorted(write_shards(tmp_path, (5, 4)).glob("*.tar")):
        store.pipe_file(f"/bucket/{shard.name}", shard.read_bytes())
    try:
        for path in ("memory://bucket/{00000..00001}.tar", "memory://bucket/", "memory://bucket/0*.tar"):
            check(opened(path))
        with pytest.raises(UserError, match=r"00002\.tar is missing"):
            opened("memory://bucket/{00000..00002}.tar")
        with pytest.raises(UserError, match=r"no \.tar"):
            opened("memory://bucket/none/")
    finally:
        store.rm("/bucket", recursive=True)


@pytest.mark.parametrize("error", [PermissionError("expired"), FileNotFoundError("gone")])
def test_what_fsspec_is_refused_in_the_middle_is_no_fault_of_the_samples(
    tmp_path: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> bytes:
        raise error

    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/00000.tar", (write_shards(tmp_path, (5,)) / "00000.tar").read_bytes())
    try:
        found = opened("memory://bucket/00000.tar", cache_gib=0)
        monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
        with pytest.raises(SampleFault) as fault:
            found.read(0)
        assert fault.value.cause == faults.UNREACHABLE_SHARD
    finally:
        store.rm("/bucket", recursive=True)


def test_file_urls_are_files(tmp_path: Path) -> None:
    found = opened((write_shards(tmp_path / "a b", (5, 4))).as_uri())
    check(found)
    assert not any(isinstance(shard, RemoteShard) for shard in found.shards)


def test_pipe_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, (5, 4))
    mark = tmp_path / "ran"
    path = f"pipe:touch {mark}; cat {folder}/{{00000..00001}}.tar"
    with pytest.raises(UserError, match=r"data\.allow_pipe=true"):
        opened(path)
    assert not mark.exists()
    shards = find_shards(path, patient(allow_pipe=True))
    with pytest.raises(Exception, match="allow_pipe"):
        patient().read(shards[0], 0, 10)  # type: ignore[arg-type]
    assert not mark.exists()
    check(opened(path, allow_pipe=True))
    assert mark.exists()


@pytest.mark.parametrize(("end", "words"), [("exit 3", "exited with 3: no luck"), ("nosuchcommand", "no such command")])
def test_a_pipe_that_fails_is_named(tmp_path: Path, end: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        opened(f"pipe:echo no luck >&2; {end}", allow_pipe=True, retry_s=0.1)
    assert "\n" not in str(error.value)
