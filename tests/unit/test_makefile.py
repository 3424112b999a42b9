"""What `make` installs: the demo the package alone, everything else the tools on top, nothing twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile, what it depends on, all an hour old, and a virtual environment in name."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "CMakeLists.txt", "csrc/a.cu", ".venv/bin/python"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((ROOT / name).read_text() if name == "Makefile" else "")
        os.utime(path, (time.time() - 3600,) * 2)
    return tmp_path


def installs(checkout, *arguments):
    """What a target would install, from a dry run; whatever variables the caller's make has set are left out."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "COSMOS"))
    }
    told = subprocess.run(
        ["make", "-n", *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=True
    ).stdout
    return [line.split("install -e ")[1] for line in told.splitlines() if "install -e " in line]


def stamp(checkout, *names):
    for old in (checkout / ".venv").glob(".installed-*"):
        old.unlink()
    for name in names:
        (checkout / ".venv" / f".installed-{name}").touch()


def test_the_demo_needs_no_tools_and_the_rest_does(checkout):
    assert installs(checkout, "demo") == ["'.'"]
    for target in ("setup", "demo-ranks", "test", "lint", "bench", "kernel-resources"):
        assert installs(checkout, target) == ["'.[dev]'"]
    assert installs(checkout, "gpu-check") == []


def test_tests_after_a_demo_install_the_tools_and_a_demo_after_tests_nothing(checkout):
    stamp(checkout, "core-AUTO-AUTO")
    assert installs(checkout, "demo") == []
    assert installs(checkout, "test") == ["'.[dev]'"]
    stamp(checkout, "core-AUTO-AUTO", "dev-AUTO-AUTO")
    assert installs(checkout, "demo") == installs(checkout, "test") == []


def test_changed_sources_and_other_switches_install_again(checkout):
    stamp(checkout, "core-AUTO-AUTO", "dev-AUTO-AUTO")
    assert installs(checkout, "test", "COSMOS_CUDA=OFF") == ["'.[dev]'"]
    later = time.time() + 5
    os.utime(checkout / "csrc" / "a.cu", (later, later))
    assert installs(checkout, "demo") == ["'.'"]
    assert installs(checkout, "test") == ["'.[dev]'"]


def test_a_real_run_leaves_the_stamps_that_the_dry_runs_look_at(checkout):
    python = checkout / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    os.utime(python, (time.time() - 3600,) * 2)
    stamp(checkout, "core-OFF-OFF", "dev-OFF-OFF")
    subprocess.run(["make", "setup"], cwd=checkout, env={"PATH": os.environ["PATH"]}, capture_output=True, check=True)
    left = sorted(path.name for path in (checkout / ".venv").glob(".installed-*"))
    assert left == [".installed-core-AUTO-AUTO", ".installed-dev-AUTO-AUTO"]
    assert installs(checkout, "demo") == installs(checkout, "test") == []


def test_the_gpu_check_leaves_its_two_files_where_it_is_told(checkout):
    environment = {"PATH": os.environ["PATH"]}
    told = [
        subprocess.run(
            ["make", "-n", "gpu-check", *more], cwd=checkout, env=environment, capture_output=True, text=True
        ).stdout.split()
        for more in ([], ["OUT=some/folder"], ["PART=tests"])
    ]
    assert "benchmarks/gpu_check.py" in told[0]
    assert "--out" not in told[0]
    assert "--only" not in told[0]
    assert told[1][-2:] == ["--out", '"some/folder"']
    assert told[2][-2:] == ["--only", "tests"]
