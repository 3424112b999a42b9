"""Imports point one way, and optional packages have one home each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.architecture.source_tree import ROOT, imports, package_of, python_files

# A package may import those before it, and itself.
ORDER = ("ops", "model", "loss", "data", "engine", "exchange", "evaluate", "recipes", "cli")
LEAVES = ("config", "utils")
ALLOWED = {package: {*LEAVES, *ORDER[: i + 1]} for i, package in enumerate(ORDER)}
ALLOWED["utils"] = {"utils"}
ALLOWED["config"] = {"config", "utils.errors"}
ALLOWED["evaluate"] -= {"engine", "exchange"}  # validators are handed to the trainer by the command
ALLOWED["data"] -= {"model", "loss"}
ALLOWED["recipes"] = {"recipes", "config", "utils"}
KERNEL_USERS = ("ops", "cli")  # cli: doctor reports on the native libraries

HOMES = ("triton", "deepspeed", "nvidia.dali", "tensorboard", "torch.utils.tensorboard", "wandb")
HOMES += ("fsspec", "apex", "torchao", "transformer_engine", "flash_attn", "flash_attn_interface", "xformers")
HOMES += ("pyarrow", "huggingface_hub")


def product_imports():
    for path in python_files("cosmos_fast"):
        yield from imports(path, package_of(path, ROOT))


def kernel_imports():
    for path in python_files("kernels/cosmos_kernels"):
        yield from imports(path, package_of(path, ROOT / "kernels"))


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_every_package_has_a_place_in_the_order():
    found = {path.parent.name for path in (ROOT / "cosmos_fast").glob("*/__init__.py")}
    assert found == {*LEAVES, *ORDER}


@pytest.mark.parametrize("package", [*LEAVES, *ORDER])
def test_imports_point_one_way(package):
    allowed = [f"cosmos_fast.{name}" for name in ALLOWED[package]]
    wrong = [
        str(found)
        for found in product_imports()
        if found.path.relative_to(ROOT / "cosmos_fast").parts[0] == package
        and is_within(found.module, "cosmos_fast")
        and not any(is_within(found.module, prefix) for prefix in allowed)
        and (package, found.module) != ("cli", "cosmos_fast")  # to ask where it is installed
    ]
    assert wrong == []


def test_only_operations_reach_the_kernels():
    wrong = [
        str(found)
        for found in product_imports()
        if is_within(found.module, "cosmos_kernels")
        and found.path.relative_to(ROOT / "cosmos_fast").parts[0] not in KERNEL_USERS
    ]
    assert wrong == []


def test_kernels_import_torch_triton_and_the_standard_library_only():
    welcome = {"torch", "triton", "cosmos_kernels", "__future__", *sys.stdlib_module_names}
    wrong = [str(found) for found in kernel_imports() if found.module.split(".")[0] not in welcome]
    assert wrong == []


@pytest.mark.parametrize("package", HOMES)
def test_optional_package_has_one_home(package):
    homes: dict[Path, str] = {}
    for found in [*product_imports(), *kernel_imports()]:
        in_kernels = is_within(package, "triton") and "kernels" in found.path.relative_to(ROOT).parts[:1]
        if is_within(found.module, package):
            homes[ROOT / "kernels" if in_kernels else found.path] = str(found)
    assert len(homes) <= 1, f"{package} is imported in several places: {sorted(homes.values())}"


@pytest.mark.parametrize("package", ["torchvision", "timm", "open_clip", "transformers", "webdataset"])
def test_packages_that_pull_or_break_things(package):
    """torchvision and friends bring a second torch; webdataset writes shards and is never read with (it unpickles)."""
    allowed = ("cosmos_fast/data",) if package == "webdataset" else ()
    wrong = [
        str(found)
        for found in [*product_imports(), *kernel_imports()]
        if is_within(found.module, package) and not str(found.path.relative_to(ROOT)).startswith(allowed or "\0")
    ]
    assert wrong == []


def test_tests_and_benchmarks_are_not_imported_by_the_product():
    wrong = [
        str(found)
        for found in [*product_imports(), *kernel_imports()]
        if found.module.split(".")[0] in ("tests", "benchmarks") and "cli/bench.py" not in str(found.path)
    ]
    assert wrong == []


def test_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package `kernels` that others import"
