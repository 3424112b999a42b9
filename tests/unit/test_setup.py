"""The build of the native libraries: what is not there costs that part only, and what was demanded is an error."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
CPU, CUDA = "libcosmos_cpu.so", "libcosmos_cuda.so"


class Machine:
    """setup.py on a machine where only some of the libraries can be built; remembers what CMake was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lib: Path) -> None:
        self.lib, self.asked = lib, []
        monkeypatch.setattr(setuptools, "setup", lambda **_: None)
        for name in ("COSMOS_NATIVE", "COSMOS_CUDA", "CXX", "CMAKE_ARGS"):
            monkeypatch.delenv(name, raising=False)
        self.module: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
        self.monkeypatch = monkeypatch

    def build(self, *, programs: tuple[str, ...], broken_cuda: bool = False) -> dict[str, str]:
        command = self.module["CMakeBuild"](setuptools.Distribution())

        def configure_and_build(cmake: str, work: Path, lib: Path, cuda: str) -> None:
            self.asked.append(cuda)
            wanted = cuda == "ON" or (cuda == "AUTO" and "nvcc" in programs)
            if wanted and (broken_cuda or "nvcc" not in programs):
                raise self.module["CannotBuild"]("cmake failed to build")
            for name in (CPU, *([CUDA] if wanted else [])):
                (lib / name).touch()

        self.monkeypatch.setattr(shutil, "which", lambda name: name if name in programs else None)
        self.monkeypatch.setattr(command, "configure_and_build", configure_and_build)
        found: dict[str, str] = command.build_native(self.lib / "work", self.lib)
        return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_without_nvcc_the_cpu_library_is_built_and_nothing_fails(machine: Machine) -> None:
    assert machine.build(programs=("c++", "cmake")) == {"cpu": "built", "cuda": "no nvcc found"}
    assert machine.asked == ["AUTO"]


def test_a_toolkit_that_does_not_build_costs_the_cuda_library_only(machine: Machine) -> None:
    found = machine.build(programs=("c++", "cmake", "nvcc"), broken_cuda=True)
    assert found == {"cpu": "built", "cuda": "nvcc found, but the CUDA library did not build"}
    assert machine.asked == ["AUTO", "OFF"]


def test_with_nvcc_both_are_built(machine: Machine) -> None:
    assert machine.build(programs=("c++", "cmake", "nvcc")) == {"cpu": "built", "cuda": "built"}


@pytest.mark.parametrize(("programs", "reason"), [(("cmake",), "no C++ compiler found"), (("c++",), "no cmake found")])
def test_without_a_compiler_or_cmake_it_goes_on_without_libraries_and_says_so(
    programs: tuple[str, ...], reason: str, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    found = machine.build(programs=programs)
    assert all(text.startswith(reason) for text in found.values())
    assert f"native libraries skipped: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize("switch", ["COSMOS_NATIVE", "COSMOS_CUDA"])
def test_what_was_demanded_and_cannot_be_built_is_an_error_of_one_line(
    switch: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(switch, "ON")
    with pytest.raises(SystemExit, match=r"^error: cannot build the native libraries: .*$"):
        machine.build(programs=("cmake",))
    monkeypatch.setenv(switch, "PERHAPS")
    with pytest.raises(SystemExit, match=f"^error: {switch}=PERHAPS: expected one of AUTO, ON, OFF$"):
        machine.build(programs=("c++", "cmake"))


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("c++"), reason="no cmake or no C++ compiler")
def test_cmake_itself_goes_on_without_nvcc_and_stops_where_it_was_demanded(tmp_path: Path) -> None:
    """On a PATH that has the compiler and make, and no nvcc."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cmake", "c++", "cc", "make", "ninja", "ld", "ar", "ranlib", "as", "nm", "strip", "uname", "sh"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CUDA")}
    environment["PATH"] = str(programs)

    def configure(cuda: str) -> subprocess.CompletedProcess[str]:
        command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / cuda), f"-DCOSMOS_CUDA={cuda}"]
        # Where CMake looks beside PATH, as in /usr/local/cuda/bin.
        command += ["-DCMAKE_FIND_USE_CMAKE_SYSTEM_PATH=OFF", "-DCMAKE_FIND_USE_SYSTEM_ENVIRONMENT_PATH=ON"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert configure("AUTO").returncode == 0
    demanded = configure("ON")
    assert demanded.returncode != 0
    assert "COSMOS_CUDA=ON, but no CUDA compiler was found" in demanded.stderr
