"""The shard index: what it finds in tar files, sound and unsound, and when its cache is believed."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from cosmos_fast.cli.data.index import command
from cosmos_fast.config import SourceConfig
from cosmos_fast.data import faults, index, index_file
from cosmos_fast.data.faults import SampleFault
from cosmos_fast.data.index import Index, open_source
from cosmos_fast.data.index_build import split_name
from cosmos_fast.data.index_summary import summarize
from cosmos_fast.utils.errors import UserError
from tests.shards import picture, record, sample, write_shards, write_tar


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("COSMOS_CACHE_DIR", str(folder))
    return folder


def opened(path: Path | str) -> Index:
    return open_source(SourceConfig(path=str(path)))


def causes(found: Index) -> list[str]:
    return [fault.cause for fault in found.faults]


def test_reads_back_every_member(tmp_path: Path) -> None:
    found = opened(write_shards(tmp_path, (5, 4)))
    assert len(found) == 9
    assert [found.key(i) for i in range(9)] == [f"{i:06d}" for i in range(9)]
    for i in range(9):
        assert found.read(i) == {"jpg": picture(i), "json": record(i)}
    assert found.name(6) == "00001.tar:000006"
    assert found.faults == []


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("length", [10, 94, 95, 96, 100, 130, 200])
def test_names_of_any_length_in_every_tar_format(tmp_path: Path, tar_format: int, length: int) -> None:
    if length == 200 and tar_format == tarfile.USTAR_FORMAT:
        length = 136  # the longest this split of folder and name can be there
    folder = "d" * 40
    stem = f"{folder}/{'k' * (length - 41)}" if length > 60 else "k" * length
    write_tar(tmp_path / "a.tar", {f"{stem}.jpg": b"image", f"{stem}.json": b"{}", "next.jpg": b"x"}, tar_format)
    found = opened(tmp_path / "a.tar")
    assert [found.key(i) for i in range(len(found))] == [stem, "next"]
    assert found.read(0) == {"jpg": b"image", "json": b"{}"}
    assert found.faults == []


def test_non_ascii_names(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"plage_été_沙滩.jpg": b"1", "plage_été_沙滩.json": b"2"}, tarfile.PAX_FORMAT)
    assert opened(tmp_path).key(0) == "plage_été_沙滩"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("./x/a.JPG", ("x/a", "jpg")),
        ("v1.2/a.mask.PNG", ("v1.2/a", "mask.png")),
        ("readme", None),
        ("x/._a.jpg", None),
        (".hidden", None),
        ("a.b/c", None),
    ],
)
def test_names_split_at_the_first_dot_of_the_last_part(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


@pytest.mark.parametrize("extension", ["JPG", "jpeg", "Png", "WEBP"])
def test_image_extensions_in_any_case(tmp_path: Path, extension: str) -> None:
    write_tar(tmp_path / "a.tar", {f"k.{extension}": b"i", "k.JSON": b"{}", "k.mask.png": b"m"})
    members = opened(tmp_path).read(0)
    assert index.image_extension(members) == extension.lower()
    assert set(members) == {extension.lower(), "json", "mask.png"}


def test_members_of_a_key_need_not_be_neighbours(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": b"1", "b.jpg": b"2", "a.json": b"3", "b.json": b"4"})
    found = opened(tmp_path)
    assert [found.read(i) for i in range(2)] == [{"jpg": b"1", "json": b"3"}, {"jpg": b"2", "json": b"4"}]


def test_duplicate_member_is_named_and_the_first_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for data in (b"first", b"second"):
            entry = tarfile.TarInfo("k.jpg")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    found = opened(tmp_path)
    assert found.read(0) == {"jpg": b"first"}
    assert causes(found) == [faults.DUPLICATE_MEMBER]
    assert found.faults[0].where == "a.tar:k"


def test_links_are_reported_and_directories_are_not(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("d", tarfile.DIRTYPE), ("k.png", tarfile.SYMTYPE), ("k2.jpg", tarfile.LNKTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        entry = tarfile.TarInfo("k.jpg")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"1"))
    found = opened(tmp_path)
    assert found.read(0) == {"jpg": b"1"}
    assert causes(found) == [faults.UNUSABLE_MEMBER] * 2


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_files_are_reported_and_cost_no_other_sample(tmp_path: Path, form: str) -> None:
    version = subprocess.run(["tar", "--version"], capture_output=True, text=True, check=False).stdout
    if "GNU tar" not in version:
        pytest.skip("needs GNU tar")
    folder = tmp_path / "files"
    folder.mkdir()
    with (folder / "a.mask").open("wb") as file:  # more holes than a header has room for, and than one block behind it
        for place in range(60):
            file.seek(place * 65_536)
            file.write(b"x" * 4096)
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(name.encode())
    command = ["tar", "-S", f"--format={form}", "-cf", str(tmp_path / "a.tar"), "a.jpg", "a.mask", "b.jpg"]
    subprocess.run(command, cwd=folder, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 60 * 65_536  # it is sparse
    found = opened(tmp_path)
    assert [found.read(i) for i in range(len(found))] == [{"jpg": b"a.jpg"}, {"jpg": b"b.jpg"}]
    assert [(fault.cause, fault.where) for fault in found.faults] == [(faults.UNUSABLE_MEMBER, "a.tar:a.mask")]


@pytest.mark.parametrize("cut_in", ["header", "data", "between"])
def test_truncated_shard_keeps_its_whole_samples(tmp_path: Path, cut_in: str) -> None:
    shard = write_shards(tmp_path, (4,)) / "00000.tar"
    with tarfile.open(shard) as archive:
        last = archive.getmember("000003.json")
    size = {"header": last.offset + 100, "data": last.offset_data + 10, "between": last.offset}[cut_in]
    os.truncate(shard, size)
    found = opened(tmp_path)
    assert [found.key(i) for i in range(len(found))] == ["000000", "000001", "000002"]
    assert found.read(2) == {"jpg": picture(2), "json": record(2)}
    assert causes(found) == [faults.TRUNCATED_SHARD]
    assert "00000.tar" in str(found.faults[0])


def test_corrupt_header_ends_that_shard_only(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, (4, 3)) / "00000.tar"
    with tarfile.open(shard) as archive:
        where = archive.getmember("000002.jpg").offset
    with open(shard, "r+b") as file:
        file.seek(where)
        file.write(b"\xff" * 512)
    found = opened(tmp_path)
    assert [found.key(i) for i in range(len(found))] == ["000000", "000001", "000004", "000005", "000006"]
    assert causes(found) == [faults.CORRUPT_SHARD]


def test_lying_sizes_do_not_reach_past_the_shard(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", {"a.jpg": b"1", "b.jpg": b"2"})
    data = bytearray(shard.read_bytes())
    header = data[1024:1536]
    header[124:136] = b"77777777777\0"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data[1024:1536] = header
    shard.write_bytes(data)
    found = opened(shard)
    assert [found.key(i) for i in range(len(found))] == ["a"]
    assert causes(found) == [faults.TRUNCATED_SHARD]


def test_sources_by_folder_glob_braces_and_file_agree(tmp_path: Path) -> None:
    write_shards(tmp_path, (2, 3, 1))
    by_path = {
        str(tmp_path): 6,
        str(tmp_path / "*.tar"): 6,
        str(tmp_path / "{00000..00002}.tar"): 6,
        str(tmp_path / "{00000,00002}.tar"): 3,
        str(tmp_path / "00001.tar"): 3,
    }
    for path, count in by_path.items():
        assert len(opened(path)) == count, path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{folder}/{{00000..00004}}.tar", ["00002.tar", "missing"]),
        ("{folder}/nothing", ["nothing", "missing"]),
        ("{folder}/x*.tar", ["no file matches"]),
        ("{folder}/..", ["give one of its folders"]),
        ("pipe:cat {folder}/00000.tar", ["pipe:", "shell command"]),
        ("nosuch://bucket/00000.tar", ["nosuch", "rotocol"]),
        ("https://host/folder/", ["do not list", "braces"]),
        ("{folder}/{{00000..", ["braces"]),
    ],
)
def test_a_source_that_cannot_be_read_ends_in_one_clear_line(tmp_path: Path, path: str, words: list[str]) -> None:
    folder = write_shards(tmp_path / "train", (2, 2))
    with pytest.raises(UserError) as error:
        opened(path.format(folder=folder))
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_files_that_are_no_tar_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(b"x" * 4000) * 40)
    with pytest.raises(UserError, match=r"no sample: not a tar file: a\.tar"):
        opened(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match="it is empty"):
        opened(tmp_path)


def test_byte_cap_holds_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", {"k.jpg": b"x" * 1000, "k.mask.png": b"x" * 5000})
    found = opened(tmp_path)
    assert set(found.read(0, max_bytes=2000, only=index.is_used_in_training)) == {"jpg"}
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("read a member over the cap"))
    with pytest.raises(SampleFault) as fault:
        found.read(0, max_bytes=999)
    assert fault.value.cause == faults.TOO_MANY_BYTES


def test_shard_that_shrinks_or_goes_away_is_a_fault_of_the_sample(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, (4,)) / "00000.tar"
    found = opened(tmp_path)
    os.truncate(shard, 1000)
    with pytest.raises(SampleFault) as fault:
        found.read(3)
    assert fault.value.cause == faults.UNREADABLE_SHARD
    found.close()
    shard.unlink()
    with pytest.raises(SampleFault):
        found.read(0)


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_OPEN_SHARDS", 3)
    found = opened(write_shards(tmp_path, (1,) * 10))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for i in range(10):
            assert found.read(i)["json"] == record(i)
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    found.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_copy_in_another_process_opens_its_own_files(tmp_path: Path) -> None:
    found = opened(write_shards(tmp_path, (3,)))
    found.read(0)
    copy = pickle.loads(pickle.dumps(found))
    found.close()
    assert copy.read(2) == {"jpg": picture(2), "json": record(2)}


def test_summary_counts_members_and_incomplete_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {**sample(0), "b.jpg": b"12", "c.json": b"{}", "d.mask.png": b"1"})
    summary = summarize(opened(tmp_path))
    assert summary.samples == 4
    assert summary.members["jpg"] == (2, 2 + len(picture(0)))
    assert summary.members["mask.png"] == (1, 1)
    assert summary.faults == {faults.MISSING_IMAGE: 2, faults.MISSING_RECORD: 2}


def test_command_prints_counts_faults_and_the_cache(tmp_path: Path) -> None:
    shard = write_shards(tmp_path, (4, 2)) / "00001.tar"
    os.truncate(shard, 3000)
    result = CliRunner().invoke(command, [str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "5 samples in 2 shards" in result.output
    assert "truncated shard: 1" in result.output
    assert index_file.FOLDER in result.output
