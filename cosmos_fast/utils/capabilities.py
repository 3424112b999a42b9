"""What this machine has: processor, GPU, build tools, and optional packages, found without importing heavy ones."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import torch


@dataclass(frozen=True)
class OptionalPackage:
    """A package that adds something. `inspect(spec, distribution)` tells what is wrong with the one found, or None."""

    name: str
    module: str
    distributions: tuple[str, ...]
    without_it: str
    inspect: Callable[[ModuleSpec, Distribution | None], str | None] = lambda spec, found: None


@dataclass(frozen=True)
class PackageStatus:
    """status: "present", "absent" or "unusable" (note says why)."""

    name: str
    status: str
    version: str | None
    note: str
    without_it: str


def _flash_attn_fault(spec: ModuleSpec, _: Distribution | None) -> str | None:
    # flash-attn-4 leaves an importable, empty `flash_attn` behind: only the function tells.
    if spec.origin is None:
        return "an empty namespace (flash-attn-4 alone): flash_attn.flash_attn_func is missing"
    module = importlib.import_module(spec.name)
    return None if hasattr(module, "flash_attn_func") else "flash_attn.flash_attn_func is missing"


def _apex_fault(spec: ModuleSpec, found: Distribution | None) -> str | None:
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    summary = (found.metadata["Summary"] if found is not None else None) or ""
    if "pyramid" in summary.lower() or not any((folder / "optimizers").is_dir() for folder in folders):
        return "not NVIDIA's apex: the package of that name on PyPI is a toolkit for web sites; uninstall it"
    return None


_DALI_BUILDS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")


def _dali_fault(_: ModuleSpec, __: Distribution | None) -> str | None:
    builds = [name for name in _DALI_BUILDS if _distribution(name) is not None]
    return f"{' and '.join(builds)} share one folder: uninstall all, install one" if len(builds) > 1 else None


PACKAGES = (
    OptionalPackage("triton", "triton", ("triton", "pytorch-triton"), "GPU kernels fall back to torch operations"),
    OptionalPackage("flash_attn", "flash_attn", ("flash-attn",), "attention runs on torch SDPA", _flash_attn_fault),
    OptionalPackage(
        "flash_attn_3",
        "flash_attn_interface",
        ("flash-attn-3", "flash_attn_3", "flashattn-hopper"),
        "attention on Hopper runs on version 2 or torch",
    ),
    OptionalPackage("xformers", "xformers", ("xformers",), "attention runs on torch SDPA"),
    OptionalPackage("deepspeed", "deepspeed", ("deepspeed",), "no ZeRO, no multi-node launcher"),
    OptionalPackage(
        "dali",
        "nvidia.dali",
        _DALI_BUILDS,
        "images are decoded and cropped by PIL",
        _dali_fault,
    ),
    OptionalPackage("apex", "apex", ("apex",), "nothing: torch and csrc do its work", _apex_fault),
    OptionalPackage("torchao", "torchao", ("torchao",), "no fp8 linear layers through it"),
    OptionalPackage(
        "transformer_engine", "transformer_engine", ("transformer-engine",), "no fp8 linear layers through it"
    ),
    OptionalPackage("webdataset", "webdataset", ("webdataset",), "no writing of shards"),
    OptionalPackage("pyarrow", "pyarrow", ("pyarrow",), "data prepare reads no parquet files"),
    OptionalPackage("huggingface_hub", "huggingface_hub", ("huggingface_hub",), "no checkpoints from hf:// addresses"),
    OptionalPackage("onnx", "onnx", ("onnx",), "no export --to onnx"),
    OptionalPackage("onnxscript", "onnxscript", ("onnxscript",), "no export --to onnx"),
    OptionalPackage("tensorboard", "tensorboard", ("tensorboard",), "metrics go to metrics.jsonl only"),
    OptionalPackage("wandb", "wandb", ("wandb",), "metrics go to metrics.jsonl only"),
)


def package_status(package: OptionalPackage) -> PackageStatus:
    """Look for a package; whatever it does wrong becomes a note, never an exception."""
    found = next((d for name in package.distributions if (d := _distribution(name)) is not None), None)
    version = None if found is None else found.version
    try:
        spec = importlib.util.find_spec(package.module)
        if spec is None:
            fault = None if found is None else f"installed, but module {package.module} is missing"
            status = "absent" if found is None else "unusable"
        else:
            fault = package.inspect(spec, found)
            status = "present" if fault is None else "unusable"
    except (KeyboardInterrupt, SystemExit):
        raise
    except ModuleNotFoundError as error:
        absent = found is None and package.module.startswith(error.name or "?")
        status, fault = ("absent", None) if absent else ("unusable", f"import fails: {error}")
    except BaseException as error:  # a broken package may raise anything
        status, fault = "unusable", f"import fails: {type(error).__name__}: {error}"
    return PackageStatus(package.name, status, version, fault or "", package.without_it)


@functools.cache
def why_unusable(name: str) -> str | None:
    """None where the package of this name in PACKAGES is present, else the reason, for a message."""
    status = package_status(next(package for package in PACKAGES if package.name == name))
    if status.status == "present":
        return None
    return f"{name} is not installed" if status.status == "absent" else f"{name}: {status.note}"


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def system() -> dict[str, str]:
    """Python, torch, processor and memory, in words."""
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "processor": f"{_cpu_model()}, {_usable_cpus()} of {os.cpu_count()} logical CPUs usable",
        "instruction set": f"{torch.backends.cpu.get_cpu_capability()}, bf16 {_cpu_bf16()}",
        "torch threads": str(torch.get_num_threads()),
        "memory": f"{_memory_gib():.1f} GiB",
    }


def gpu() -> dict[str, str]:
    """Devices by index, or one entry "none" with the reason."""
    if torch.version.cuda is None and torch.version.hip is None:
        return {"none": "this torch is built without CUDA"}
    if not torch.cuda.is_available():
        return {"none": f"torch is built for CUDA {torch.version.cuda}, but no usable device or driver was found"}
    found = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[str(index)] = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB, "
            f"CUDA {torch.version.cuda}"
        )
    return found


def build_tools() -> dict[str, str]:
    """Compilers that an installation would find."""
    names = {"C++ compiler": ("c++", "g++", "clang++"), "cmake": ("cmake",), "nvcc": ("nvcc",)}
    return {
        label: next((path for name in candidates if (path := shutil.which(name))), "not found")
        for label, candidates in names.items()
    }


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cpu_bf16() -> str:
    flags = _cpuinfo()
    return next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags), "emulated")


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return float("nan")
