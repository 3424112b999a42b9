"""Build step for the native libraries of csrc/: setup.py -> CMake -> plain C shared libraries, loaded through ctypes.

Everything else about the package stands in pyproject.toml. Two environment variables choose what is built:

    COSMOS_NATIVE = AUTO | ON | OFF   the CPU library   (AUTO: built where a C++ compiler is found)
    COSMOS_CUDA   = AUTO | ON | OFF   the CUDA library  (AUTO: built where nvcc is found)

ON turns "cannot be built" from a note into an error. The outcome is written to cosmos_kernels/_lib/build.json, which
`cosmos-fast doctor` reads. torch takes no part in the build, so that no build environment ever fetches one.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SWITCHES = ("AUTO", "ON", "OFF")


def switch(name: str) -> str:
    """Value of an AUTO|ON|OFF environment variable."""
    value = os.environ.get(name, "AUTO").strip().upper() or "AUTO"
    if value not in SWITCHES:
        raise SystemExit(f"error: {name}={value}: expected one of {', '.join(SWITCHES)}")
    return value


def cxx_compiler() -> str | None:
    """The C++ compiler that CMake would pick, or None."""
    wanted = os.environ.get("CXX")
    candidates = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    return next((found for name in candidates if (found := shutil.which(name))), None)


def build_requirements() -> list[str]:
    """CMake as a build requirement, only where it would be used and the system has none."""
    wanted = switch("COSMOS_NATIVE") != "OFF" and cxx_compiler() is not None
    return ["cmake>=3.22"] if wanted and shutil.which("cmake") is None else []


class CannotBuild(Exception):
    """The native libraries cannot be built here; the text says why and how to mend it."""


class CMakeBuild(build_ext):
    """Builds csrc/ and installs the libraries in cosmos_kernels/_lib.

    An editable install puts them into the source tree, a wheel into the build tree. The one declared output is
    build.json, so that setuptools finds its "extension" also where no library could be built.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".json"

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an editable build installs in place."""

    def build_extension(self, ext: Extension) -> None:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        built = Path(self.get_ext_fullpath(ext.name)).resolve()
        lib = ROOT / "kernels" / "cosmos_kernels" / "_lib" if inplace else built.parent
        work = ROOT / "build" / "cmake-editable" if inplace else Path(self.build_temp).resolve() / "cmake"
        lib.mkdir(parents=True, exist_ok=True)
        for stale in lib.glob("*.so"):
            stale.unlink()
        report = self.build_native(work, lib)
        text = json.dumps(report, indent=1) + "\n"
        (lib / "build.json").write_text(text)
        if inplace:  # setuptools looks for the declared output here as well
            built.parent.mkdir(parents=True, exist_ok=True)
            built.write_text(text)

    def build_native(self, work: Path, lib: Path) -> dict[str, str]:
        """Build what can be built; returns {library: "built" or the reason why it is missing}."""
        native, cuda = switch("COSMOS_NATIVE"), switch("COSMOS_CUDA")
        if native == "OFF":
            if cuda == "ON":
                raise SystemExit("error: COSMOS_CUDA=ON needs COSMOS_NATIVE=AUTO or ON")
            return self.skipped("switched off by COSMOS_NATIVE=OFF")
        try:
            return self.cmake(work, lib, cuda)
        except CannotBuild as reason:
            if native == "ON" or cuda == "ON":
                raise SystemExit(f"error: cannot build the native libraries: {reason}") from None
            return self.skipped(str(reason))

    def skipped(self, reason: str) -> dict[str, str]:
        print(f"cosmos-fast: native libraries skipped: {reason}. Everything works without them, only slower.")
        return {"cpu": reason, "cuda": reason}

    def cmake(self, work: Path, lib: Path, cuda: str) -> dict[str, str]:
        if cxx_compiler() is None:
            raise CannotBuild("no C++ compiler found (install g++ or clang++, or set CXX)")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise CannotBuild("no cmake found (install cmake 3.22 or newer)")
        try:
            self.configure_and_build(cmake, work, lib, cuda)
        except CannotBuild:
            if cuda != "AUTO":
                raise
            # A CUDA toolkit that does not fit the host compiler must not cost the CPU library.
            self.configure_and_build(cmake, work, lib, "OFF")
        toolkit = "no nvcc found" if shutil.which("nvcc") is None else "nvcc found, but the CUDA library did not build"
        missing = {"cpu": "not built", "cuda": "switched off by COSMOS_CUDA=OFF" if cuda == "OFF" else toolkit}
        names = {"cpu": "libcosmos_cpu.so", "cuda": "libcosmos_cuda.so"}
        return {key: "built" if (lib / name).exists() else missing[key] for key, name in names.items()}

    def configure_and_build(self, cmake: str, work: Path, lib: Path, cuda: str) -> None:
        configure = [cmake, "-S", str(ROOT), "-B", str(work), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_INSTALL_PREFIX={lib}", f"-DCOSMOS_CUDA={cuda}"]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        if shutil.which("ninja") and not (work / "Makefile").exists():
            configure += ["-G", "Ninja"]
        try:
            subprocess.run(configure, check=True)
        except subprocess.CalledProcessError:
            # The cache may remember a compiler or generator that is gone: once more from nothing.
            shutil.rmtree(work, ignore_errors=True)
            self.run_step(configure, "configure")
        self.run_step([cmake, "--build", str(work), "--parallel", os.environ.get("MAX_JOBS", "2")], "build")
        self.run_step([cmake, "--install", str(work)], "install")

    def run_step(self, command: list[str], step: str) -> None:
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CannotBuild(f"cmake failed to {step} (run pip with -v to see its output)") from error


class PlatformWheel(bdist_wheel):
    """Plain C libraries depend on the platform, not on the Python version."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if platform.system() == "Windows":
    sys.exit("error: Windows is not supported; use WSL")

setup(
    ext_modules=[Extension("cosmos_kernels._lib.build", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    setup_requires=build_requirements(),
)
