"""The loaders' pixels against PIL's, operation by operation: as docs/augmentation.md says, no worse and no better."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.augmentation_parity import Case, Error, cases, line

DOCUMENT = Path(__file__).parents[2] / "docs" / "augmentation.md"
ROW = re.compile(r"^\| ([^|]+) \| ([\d.]+) \| (\d+) \| ([\d.]+) \| (\d+) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def measured() -> list[Case]:
    return list(cases())


def documented() -> dict[str, tuple[Error, Error]]:
    rows = ROW.findall(DOCUMENT.read_text(encoding="utf-8"))
    return {name: (Error(float(a), int(b)), Error(float(c), int(d))) for name, a, b, c, d in rows}


def test_the_table_names_every_operation(measured: list[Case]) -> None:
    assert [case.operation for case in measured] == list(documented())


def test_errors_are_those_of_the_table(measured: list[Case]) -> None:
    """Other releases of PIL, torch and DALI round a little differently."""
    wrong = []
    for case in measured:
        for found, shown in zip((case.cpu, case.gpu), documented()[case.operation], strict=True):
            if found is not None and not 0.8 * shown.mean - 0.02 <= found.mean <= 1.25 * shown.mean + 0.02:
                wrong.append((line(case), shown))
    assert not wrong


def test_nothing_but_roundings_differs(measured: list[Case]) -> None:
    """A quarter of a level on average, whatever the operation; crops cut on a CPU are PIL's but for a level."""
    for case in measured:
        for error in (case.cpu, case.gpu):
            if error is not None:
                assert error.mean < 0.4, case
                assert error.most <= 10, case
        if "cut" in case.operation:
            assert case.cpu.most <= 1, case
