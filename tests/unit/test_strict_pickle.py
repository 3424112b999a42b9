"""Plain data is read out of pickles of any protocol; nothing is imported or called, whatever a pickle asks for."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cosmos_fast.evaluate.datasets.strict_pickle import read_pickle
from tests.benchmark_folders.cifar_archives import old_array, old_list, old_pickle, old_text

PLAIN = {
    "labels": list(range(3000)),
    "data": np.arange(24, dtype=np.uint8).reshape(2, 12),
    "names": ["a", "ü", ""],
    "raw": b"\x00\xff",
    "more": (None, True, False, -5, 2**70, 0.5, {"a": [1, (2, 3), (1, 2, 3, 4)]}),
}


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "p"
    path.write_bytes(content)
    return path


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    arrays = [name for name, value in wanted.items() if isinstance(value, np.ndarray)]
    equal = all(
        np.array_equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in arrays
    )
    rest = [name for name in wanted if name not in arrays]
    return equal and {name: found[name] for name in rest} == {name: wanted[name] for name in rest}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_python_3_wrote_is_read_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    wanted = PLAIN if protocol else {**PLAIN, "raw": "text"}
    found = read_pickle(written(tmp_path, pickle.dumps(wanted, protocol)))
    assert list(found) == list(wanted)
    assert same(found, wanted)


def test_what_python_2_wrote_is_read_as_pickle_reads_it_with_bytes(tmp_path: Path) -> None:
    array = np.arange(3 * 300, dtype=np.uint8).reshape(3, 300)
    content = old_pickle(labels=old_list([3, 1]), data=old_array(array), names=old_list([b"a", b"\xe4"]))
    by_pickle = pickle.loads(content, encoding="bytes")
    found = read_pickle(written(tmp_path, content))
    assert same(found, {key.decode(): value for key, value in by_pickle.items()})
    assert np.array_equal(found["data"], array)


def test_arrays_keep_their_order_and_type(tmp_path: Path) -> None:
    for array in (
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(4, dtype=">i2"),
        np.zeros((0, 3), np.int64),
    ):
        for protocol in (2, 4, 5):
            found = read_pickle(written(tmp_path, pickle.dumps({"a": array}, protocol)))["a"]
            assert np.array_equal(found, array)
            assert (found.shape, found.dtype) == (array.shape, array.dtype)


class Calls:
    """Pickled as a call of something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Plain:
    """An object of a class."""


HARMFUL = {
    "a command": (Calls(os.system, "mkdir harm"), "wants to run posix.system"),
    "a folder": (Calls(os.mkdir, "harm"), "wants to run posix.mkdir"),
    "eval": (Calls(eval, "1"), "wants to run (__builtin__|builtins).eval"),
    "an import": (Calls(__import__, "os"), "wants to run (__builtin__|builtins).__import__"),
    "an object": (Plain(), "Plain, which is never done"),
    "bytes of a size": (Calls(bytes, 2**40), "wants to run (__builtin__|builtins).bytes"),
    "numpy's own loader": (Calls(np.load, "x"), "wants to run numpy.load"),
    "a set": ({1}, "EMPTY_SET, which is no plain data"),
    "an array of objects": (np.array([None, 1], dtype=object), "no plain number"),
}


@pytest.mark.parametrize("wish", HARMFUL)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_wants_more_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wish: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    value, said = HARMFUL[wish]
    if wish == "a set" and protocol == 2:
        said = "set, which is never done"
    with pytest.raises(ValueError, match=said):
        read_pickle(written(tmp_path, pickle.dumps({"a": value}, protocol)))
    assert not (tmp_path / "harm").exists()


HEAD = b"\x80\x02"
NONSENSE = {
    "a call of data": HEAD + b"K\x01)R.",
    "a call of a name that only stands for a type": HEAD + b"cnumpy\nndarray\n)R.",
    "another coding": HEAD + b"c_codecs\nencode\n(U\x01aU\x04rot13tR.".replace(b"U\x04rot13", b"U\x05rot13"),
    "a change of data": HEAD + b"K\x01)b.",
    "a change of a name": HEAD + b"cnumpy\nndarray\n}b.",
    "an append to a number": HEAD + b"K\x01K\x02a.",
    "an entry of a list": HEAD + b"]K\x01K\x02s.",
    "an odd number of entries": HEAD + b"}(K\x01u.",
    "a list as a key": HEAD + b"}]K\x01s.",
    "no mark": HEAD + b"K\x01e.",
    "a value that was never named": HEAD + b"h\x09.",
    "nothing": HEAD + b".",
    "an empty file": b"",
    "no end": HEAD + b"K\x01",
    "an object of its own storing": HEAD + old_text(b"x") + b"Q.",
    "an array larger than its bytes": HEAD
    + old_array(np.zeros((2, 300), np.uint8)).replace(b"M\x02\x00", b"M\x09\x00")
    + b".",
}


@pytest.mark.parametrize("case", NONSENSE)
def test_instructions_that_make_no_sense_are_refused(tmp_path: Path, case: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_pickle(written(tmp_path, NONSENSE[case]))


def test_a_pickle_that_is_spoilt_anywhere_is_a_value_error_or_plain_data(tmp_path: Path) -> None:
    whole = old_pickle(labels=old_list([3, 1]), data=old_array(np.zeros((1, 300), np.uint8)))
    for size in range(0, len(whole), 2):
        with pytest.raises(ValueError, match=r"."):
            read_pickle(written(tmp_path, whole[:size]))
    chance = random.Random(7)
    plain = (dict, list, tuple, str, bytes, bytearray, int, float, np.ndarray, type(None))
    for _ in range(500):
        spoilt = bytearray(whole)
        spoilt[chance.randrange(len(spoilt))] = chance.randrange(256)
        try:
            assert isinstance(read_pickle(written(tmp_path, bytes(spoilt))), plain)
        except ValueError:
            continue
