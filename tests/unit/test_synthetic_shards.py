"""`cosmos-fast data synth`: byte-identical, resumable shards; one clear line for every mistake."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos_fast.cli.main import command, run
from cosmos_fast.data.synthetic import shards as shards_module
from cosmos_fast.data.synthetic.scene import SceneSettings
from cosmos_fast.data.synthetic.writer import DatasetSettings, missing_shards, write_dataset
from cosmos_fast.utils.errors import UserError
from tests.held import kill_where_held

TINY = SceneSettings(seed=5, min_side=48, max_side=64, max_objects=3)
SETTINGS = DatasetSettings(train=25, heldout=8, shard_size=10, scene=TINY)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def synth(out: Path, *extra: str, train: int = 25, heldout: int = 8, shard_size: int = 10) -> list[str]:
    sizes = ["--train", str(train), "--heldout", str(heldout), "--shard-size", str(shard_size)]
    scene = ["--seed", "5", "--size", "48-64", "--max-objects", "3", "--workers", "1"]
    return ["data", "synth", "--out", str(out), *sizes, *scene, *extra]


def test_members_keys_and_meta(tmp_path: Path) -> None:
    assert write_dataset(tmp_path, SETTINGS, workers=1) == 4
    names = ["heldout/00000.tar", "meta.json", "train/00000.tar", "train/00001.tar", "train/00002.tar"]
    assert sorted(files_of(tmp_path)) == names
    keys: list[str] = []
    jpeg_sizes = set()
    for name in names:
        if name == "meta.json":
            continue
        with tarfile.open(tmp_path / name) as tar:
            members = tar.getmembers()
            assert {(m.mtime, m.uname, m.gname, m.mode) for m in members} == {(0, "cosmos", "cosmos", 0o444)}
            for jpg, record, mask in zip(members[0::3], members[1::3], members[2::3], strict=True):
                key = jpg.name.removesuffix(".jpg")
                assert (record.name, mask.name) == (f"{key}.json", f"{key}.mask.png")
                keys.append(key)
                image = Image.open(io.BytesIO(tar.extractfile(jpg).read()))  # type: ignore[union-attr]
                instances = Image.open(io.BytesIO(tar.extractfile(mask).read()))  # type: ignore[union-attr]
                assert (image.format, image.mode) == ("JPEG", "RGB")
                assert (instances.mode, instances.size) == ("L", image.size)
                objects = json.loads(tar.extractfile(record).read())["scene"]["objects"]  # type: ignore[union-attr]
                assert set(np.unique(np.asarray(instances))) == {0, *(item["instance"] for item in objects)}
                jpeg_sizes.add(image.size)
    assert len(set(keys)) == 33
    assert {len(key) for key in keys if key.startswith("train")} == {13}
    assert len(jpeg_sizes) > 15
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["seed"] == 5
    assert meta["counts"] == {"train": 25, "heldout": 8}
    assert len(meta["shapes"]) == len(meta["colours"]) == len(meta["backgrounds"]) == 8
    assert all("{}" in template for template in meta["templates"] + meta["colour_templates"])
    for kind in ("shapes", "colours", "backgrounds"):
        assert list(meta["synonyms"][kind]) == meta[kind]


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", SETTINGS, workers=1)
    write_dataset(tmp_path / "b", SETTINGS, workers=1)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    other = DatasetSettings(train=25, heldout=8, shard_size=10, scene=SceneSettings(seed=6, min_side=48, max_side=64))
    write_dataset(tmp_path / "c", other, workers=1)
    a, c = files_of(tmp_path / "a"), files_of(tmp_path / "c")
    assert all(a[name] != c[name] for name in a)


def test_scenes_do_not_depend_on_the_size_of_the_set_or_of_shards(tmp_path: Path) -> None:
    def members(folder: Path, split: str) -> dict[str, bytes]:
        found = {}
        for shard in sorted((folder / split).glob("*.tar")):
            with tarfile.open(shard) as tar:
                found |= {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
        return found

    write_dataset(tmp_path / "a", SETTINGS, workers=1)
    write_dataset(tmp_path / "b", DatasetSettings(train=7, heldout=11, shard_size=4, scene=TINY), workers=1)
    for split, shared in (("train", 7), ("heldout", 8)):
        a, b = members(tmp_path / "a", split), members(tmp_path / "b", split)
        assert len(a.keys() & b.keys()) == 3 * shared
        assert all(a[name] == b[name] for name in a.keys() & b.keys())


def test_killed_half_way_the_same_command_completes_it_byte_for_byte(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    size = {"train": 40, "heldout": 10, "shard_size": 10}
    kill_where_held(
        tmp_path / "held",
        synth(broken, "--workers", "2", **size),
        "cosmos_fast.data.synthetic.shards",
        "make_sample",
        "arguments[0].key in ('train_0000025', 'train_0000035')",  # in the middle of the third and the fourth shard
        processes=2,
    )
    finished = {path: path.stat().st_mtime_ns for path in broken.glob("*/*.tar")}
    assert [path.name for path in sorted(finished)] == ["00000.tar", "00001.tar"]
    assert len(list(broken.glob("*/*.tmp"))) == 2
    (broken / "train" / "00009.tar.tmp").write_bytes(b"left by an earlier kill")

    assert run(command, synth(broken, **size)) == 0
    assert run(command, synth(whole, **size)) == 0
    assert files_of(broken) == files_of(whole)
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())  # kept, not drawn again


def test_complete_data_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, synth(tmp_path)) == 0
    assert "wrote 33 scenes in 4 shards" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(command, synth(tmp_path)) == 0
    assert "complete already, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("damage", ["truncated", "empty", "deleted"])
def test_a_damaged_shard_is_made_again(tmp_path: Path, damage: str) -> None:
    write_dataset(tmp_path, SETTINGS, workers=1)
    whole = files_of(tmp_path)
    shard = tmp_path / "train" / "00001.tar"
    if damage == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: 10240 if damage == "truncated" else 0])
    assert [s.path for s in missing_shards(tmp_path, SETTINGS)] == [shard]
    assert write_dataset(tmp_path, SETTINGS, workers=1) == 1
    assert files_of(tmp_path) == whole


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--seed", "6"], "seed 5 there, 6 asked"),
        (["--train", "26"], "train 25 there, 26 asked"),
        (["--size", "48-65"], "max_side 64 there, 65 asked"),
    ],
)
def test_other_parameters_in_the_same_directory_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], told: str
) -> None:
    assert run(command, synth(tmp_path)) == 0
    before = files_of(tmp_path)
    assert run(command, synth(tmp_path, *change)) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert "\n" not in error
    assert files_of(tmp_path) == before


def test_foreign_shards_and_damaged_meta_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "00000.tar").write_bytes(b"somebody's data")
    with pytest.raises(UserError, match=r"no meta\.json"):
        write_dataset(tmp_path, SETTINGS, workers=1)
    (tmp_path / "meta.json").write_text("[1]")
    with pytest.raises(UserError, match="damaged"):
        write_dataset(tmp_path, SETTINGS, workers=1)
    assert (tmp_path / "train" / "00000.tar").read_bytes() == b"somebody's data"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--size", "96x192"],
        ["--size", "64-48"],
        ["--size", "20"],
        ["--min-objects", "4"],  # the most is 3
        ["--max-objects", "12"],
        ["--train", "-1"],
        ["--train", "0", "--heldout", "0"],
        ["--shard-size", "0"],
        ["--seed", "-1"],
        ["--workers", "0"],
        ["--heldout", "90", "--min-objects", "1", "--max-objects", "1"],
        ["--no-such-option"],
    ],
)
def test_bad_arguments_exit_with_2_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    out = tmp_path / "data"
    assert run(command, synth(out, *wrong)) == 2
    assert "error" in capsys.readouterr().err.lower()
    assert not out.exists()


def test_full_disk_is_one_line_and_leaves_no_broken_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_at_the_second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shards_module.os, "fsync", fail_at_the_second)
        patch.setattr(shards_module, "fsync_path", lambda path: None)
        patch.setattr("cosmos_fast.data.synthetic.writer.write_atomic", lambda path, text: path.write_text(text))
        assert run(command, synth(tmp_path)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: cannot write")
    assert "train/00001.tar: No space left on device" in error
    assert "\n" not in error
    assert sorted(files_of(tmp_path)) == ["meta.json", "train/00000.tar"]
    assert run(command, synth(tmp_path)) == 0
    write_dataset(tmp_path / "whole", SETTINGS, workers=1)
    whole = files_of(tmp_path / "whole")
    assert {name: content for name, content in files_of(tmp_path).items() if not name.startswith("whole")} == whole


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    from cosmos_fast.data.shard_files import locked

    with locked(tmp_path), pytest.raises(UserError, match="another process is writing"):
        write_dataset(tmp_path, SETTINGS, workers=1)
    assert write_dataset(tmp_path, SETTINGS, workers=1) == 4
