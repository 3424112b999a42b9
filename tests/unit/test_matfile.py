"""MATLAB files: what is read of them, and that broken ones are refused whatever is wrong with them."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from cosmos_fast.evaluate.datasets import matfile
from cosmos_fast.evaluate.datasets.matfile import read_mat
from tests.benchmark_folders.matlab import element, head, matrix, write_mat

VALUES = {
    "labels": np.array([[1.0, 77.0, 102.0]]),
    "table": np.arange(6, dtype=np.int32).reshape(2, 3),
    "real": np.array([[0.5], [-3.25]]),
    "names": ["AM General Hummer", "", "Coupé"],
    "rows": [{"class": 3.0, "fname": "00001.jpg"}, {"class": 196.0, "fname": "2"}],
    "word": "text",
}


def check(found: dict) -> None:
    assert list(found) == list(VALUES)
    for name in ("labels", "table", "real"):
        assert np.array_equal(found[name], VALUES[name])
        assert found[name].shape == VALUES[name].shape
    assert found["names"] == VALUES["names"]
    assert found["word"] == "text"
    assert [(row["class"].item(), row["fname"]) for row in found["rows"]] == [(3.0, "00001.jpg"), (196.0, "2")]


@pytest.mark.parametrize("compress", [False, True])
def test_numbers_text_cells_and_structs_are_read(tmp_path: Path, compress: bool) -> None:
    check(read_mat(write_mat(tmp_path / "v.mat", compress, **VALUES)))


@pytest.mark.parametrize("compress", [False, True])
def test_files_of_scipy_are_read_and_ours_are_read_by_it(tmp_path: Path, compress: bool) -> None:
    io = pytest.importorskip("scipy.io", reason="scipy is not installed")
    cell = np.empty((1, 3), dtype=object)
    cell[0] = VALUES["names"]
    rows = np.array([[(3.0, "00001.jpg"), (196.0, "2")]], dtype=[("class", object), ("fname", object)])
    io.savemat(tmp_path / "s.mat", {**VALUES, "names": cell, "rows": rows}, do_compression=compress)
    check(read_mat(tmp_path / "s.mat"))
    theirs = io.loadmat(write_mat(tmp_path / "o.mat", compress, **VALUES), uint16_codec="utf-16-le")
    assert np.array_equal(theirs["labels"], VALUES["labels"])
    assert [one[0] if len(one) else "" for one in theirs["names"][0]] == VALUES["names"]
    assert [row["fname"][0] for row in theirs["rows"][0]] == ["00001.jpg", "2"]


def test_the_other_byte_order_is_read(tmp_path: Path) -> None:
    def big(kind: int, data: bytes) -> bytes:
        return struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")

    body = big(6, struct.pack(">II", 6, 0)) + big(5, struct.pack(">2i", 1, 2)) + big(1, b"v")
    body += big(9, struct.pack(">2d", 1.5, -2))
    path = tmp_path / "b.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI" + big(14, body))
    assert read_mat(path)["v"].tolist() == [[1.5, -2.0]]


def test_newer_files_and_kinds_with_a_meaning_in_matlab_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.mat"
    path.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(128) + b"\x89HDF\r\n")
    with pytest.raises(ValueError, match=r"MATLAB 7\.3"):
        read_mat(path)
    for kind, said in ((3, "not read"), (16, "not read"), (5, "not read"), (6 | 0x0800, "complex")):
        body = head(kind, (1, 1), "v") + element(9, struct.pack("<d", 1))
        path.write_bytes(write_mat(path).read_bytes() + struct.pack("<II", 14, len(body)) + body)
        with pytest.raises(ValueError, match=said):
            read_mat(path)


def test_a_small_file_that_unpacks_to_much_and_deep_nesting_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matfile, "_MAX_BYTES", 10_000)
    path = write_mat(tmp_path / "v.mat", True, a=np.zeros((1, 1000), np.float32), b=np.zeros((1, 1000), np.float32))
    assert set(read_mat(path)) == {"a", "b"}
    path = write_mat(tmp_path / "v.mat", True, a=np.zeros((1, 2000), np.float32), b=np.zeros((1, 1000), np.float32))
    with pytest.raises(ValueError, match="unpacks to too much"):
        read_mat(path)
    value: object = 1.0
    for _ in range(20):
        value = [value]
    with pytest.raises(ValueError, match="too deep"):
        read_mat(write_mat(tmp_path / "v.mat", False, v=value))


def test_a_file_that_is_cut_off_or_spoilt_anywhere_is_a_value_error_or_read(tmp_path: Path) -> None:
    whole = write_mat(tmp_path / "v.mat", False, **VALUES).read_bytes()
    path = tmp_path / "spoilt.mat"
    starts = {128}
    for name, value in VALUES.items():
        starts.add(max(starts) + len(matrix(value, name)))
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        if size in starts:
            assert len(read_mat(path)) < len(VALUES)  # it ends where a variable does
        else:
            with pytest.raises(ValueError):  # noqa: PT011 - many things can be wrong
                read_mat(path)
    chance = random.Random(5)
    for _ in range(400):
        spoilt = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            spoilt[chance.randrange(128, len(spoilt))] = chance.choice((0, 1, 14, 15, 127, 255, chance.randrange(256)))
        path.write_bytes(spoilt)
        try:
            read_mat(path)
        except ValueError:
            continue


def test_a_compressed_variable_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    packed = zlib.compress(matrix(np.arange(50.0), "v"))[:-6]
    path = write_mat(tmp_path / "v.mat")
    path.write_bytes(path.read_bytes() + struct.pack("<II", 15, len(packed)) + packed)
    with pytest.raises(ValueError, match="cut off"):
        read_mat(path)
