"""Miniatures of CIFAR's archives: the pickles of Python 2 byte by byte, the records of the binary ones."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.benchmark_folders.answers import Answers, photo, write_lines


def pixels(number: int) -> np.ndarray:
    """uint8 [3, 32, 32]."""
    return np.asarray(photo(number).resize((32, 32))).transpose(2, 0, 1)


def cifar_answers(labels: tuple[int, ...], names: tuple[str, ...]) -> Answers:
    return Answers(tuple(range(len(labels))), labels, names, image=lambda number: photo(number).resize((32, 32)))


def old_text(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def old_list(values: Sequence[int | bytes]) -> bytes:
    items = [old_text(one) if isinstance(one, bytes) else b"K" + bytes([one]) for one in values]
    return b"]q\x07(" + b"".join(items) + b"e"


def old_array(array: np.ndarray) -> bytes:
    """A numpy array as Python 2 and numpy 1 pickled it."""
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x08"
    shape = b"".join(b"M" + struct.pack("<H", size) for size in array.shape)
    kind = b"cnumpy\ndtype\nq\x09U\x02u1K\x00K\x01\x87Rq\x0a(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data = array.tobytes()
    return made + b"(K\x01" + shape + b"\x86" + kind + b"\x89T" + struct.pack("<I", len(data)) + data + b"tb"


def old_pickle(**entries: bytes) -> bytes:
    """A dictionary as Python 2 wrote it, in protocol 2."""
    pairs = (old_text(key.encode()) + value for key, value in entries.items())
    return b"\x80\x02}q\x01(" + b"".join(pairs) + b"u."


def write_cifar10(root: Path, labels: tuple[int, ...] = (3, 0, 9, 3)) -> Answers:
    """The python archive: names in protocol 0, as text."""
    names = [f"thing_{number}" for number in range(10)]
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    listed = "".join(f"S'{name}'\np{number + 3}\na" for number, name in enumerate(names))
    meta = f"(dp1\nS'num_cases_per_batch'\nI10000\nsS'label_names'\n(lp2\n{listed}sS'num_vis'\nI3072\ns."
    (folder / "batches.meta").write_bytes(meta.encode())
    data = np.stack([pixels(number).ravel() for number in range(4)])
    files = old_list([b"a_s_000001.png", b"b.png", b"c.png", b"d.png"])
    batch = old_pickle(batch_label=old_text(b"testing batch 1 of 1"), labels=old_list(labels), data=old_array(data),
                       filenames=files)  # fmt: skip
    (folder / "test_batch").write_bytes(batch)
    return cifar_answers(labels, tuple(f"thing {number}" for number in range(10)))


def write_cifar10_binary(root: Path, labels: tuple[int, ...] = (3, 0, 9, 3)) -> Answers:
    folder = root / "cifar-10-batches-bin"
    write_lines(folder / "batches.meta.txt", [*(f"thing_{number}" for number in range(10)), ""])
    records = [bytes([label]) + pixels(number).tobytes() for number, label in enumerate(labels)]
    (folder / "test_batch.bin").write_bytes(b"".join(records))
    return cifar_answers(labels, tuple(f"thing {number}" for number in range(10)))


def write_cifar100(root: Path, labels: tuple[int, ...] = (70, 0, 99)) -> Answers:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    coarse = old_list([1, 2, 3])
    data = old_array(np.stack([pixels(number).ravel() for number in range(3)]))
    (folder / "meta").write_bytes(
        old_pickle(
            fine_label_names=old_list([f"fine_{number}".encode() for number in range(100)]),
            coarse_label_names=old_list([b"coarse"]),
        )
    )
    (folder / "test").write_bytes(old_pickle(data=data, fine_labels=old_list(labels), coarse_labels=coarse))
    return cifar_answers(labels, tuple(f"fine {number}" for number in range(100)))


def write_cifar100_binary(root: Path, labels: tuple[int, ...] = (70, 0, 99)) -> Answers:
    folder = root / "cifar-100-binary"
    write_lines(folder / "fine_label_names.txt", [f"fine_{number}" for number in range(100)])
    write_lines(folder / "coarse_label_names.txt", ["coarse"])
    records = [bytes([number, label]) + pixels(number).tobytes() for number, label in enumerate(labels)]
    (folder / "test.bin").write_bytes(b"".join(records))
    return cifar_answers(labels, tuple(f"fine {number}" for number in range(100)))


def write_cifar100_of_today(root: Path, labels: tuple[int, ...] = (70, 0, 99)) -> Answers:
    """As somebody would write it with Python 3, in the newest protocol."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    names = [f"fine_{number}" for number in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    data = np.stack([pixels(number).ravel() for number in range(3)])
    (folder / "test").write_bytes(pickle.dumps({"fine_labels": list(labels), "data": data}))
    return cifar_answers(labels, tuple(f"fine {number}" for number in range(100)))
