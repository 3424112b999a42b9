"""doctor: tells present, absent and broken packages apart, and survives all of them."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from cosmos_fast.cli import doctor
from cosmos_fast.data import dali_pipeline
from cosmos_fast.utils import capabilities
from cosmos_fast.utils.capabilities import OptionalPackage, package_status
from cosmos_kernels import native

BY_NAME = {package.name: package for package in capabilities.PACKAGES}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder at the front of sys.path to put packages in; forgets them afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("flash_attn", "apex", "broken_package"):
            del sys.modules[name]


def add(site, module, source, distribution=None, summary="something"):
    package = site / module
    package.mkdir()
    if source is not None:
        (package / "__init__.py").write_text(source)
    if distribution is not None:
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\nSummary: {summary}\n"
        (info / "METADATA").write_text(text)
    return package


def test_every_part_is_reported():
    result = CliRunner().invoke(doctor.command, ["--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert {row["name"] for row in report["packages"]} == set(BY_NAME)
    assert {row["library"] for row in report["native"]} == {"cpu", "cuda"}
    listed = {(row["op"], row["backend"]) for row in report["backends"]}
    assert {("adamw_ema", "native"), ("adamw_ema", "eager"), ("grad_norm", "eager")} <= listed
    assert {op for op, _ in listed} >= {"multiview_infonce", "cross_attention_pool"}
    assert report["faults"] == []
    for row in report["backends"]:
        of_a_gpu = row["backend"] in ("triton", "cuda")
        assert row["hardware"].startswith(("tested on", "compiled, not yet run on hardware")) == of_a_gpu, row


def test_tables_show_reasons(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    (tmp_path / "build.json").write_text('{"cpu": "no compiler [here]", "cuda": "no nvcc found"}')
    monkeypatch.setenv("COLUMNS", "300")
    native._load.cache_clear()
    try:
        output = CliRunner().invoke(doctor.command, []).output
    finally:
        native._load.cache_clear()
    assert "not built: no compiler [here]" in output  # brackets are not taken for markup
    assert "not built: no nvcc found" in output


def test_absent_and_present_package():
    assert package_status(OptionalPackage("x", "no_such_module_x", ("no-such-x",), "y")).status == "absent"
    assert package_status(OptionalPackage("x", "no_such_parent.child", ("no-such-x",), "y")).status == "absent"
    found = package_status(OptionalPackage("pytest", "pytest", ("pytest",), "y"))
    assert (found.status, found.version) == ("present", pytest.__version__)


def test_flash_attn_4_leaves_an_empty_namespace(site):
    add(site, "flash_attn", None)
    status = package_status(BY_NAME["flash_attn"])
    assert status.status == "unusable"
    assert "flash_attn_func is missing" in status.note


@pytest.mark.parametrize(
    ("source", "status", "note"),
    [
        ("def flash_attn_func(): ...", "present", ""),
        ("x = 1", "unusable", "flash_attn_func is missing"),
        ("raise ImportError('undefined symbol: _ZN3c10')", "unusable", "undefined symbol"),
        ("raise RuntimeError('built for another torch')", "unusable", "built for another torch"),
    ],
)
def test_flash_attn_is_judged_by_its_function(site, source, status, note):
    add(site, "flash_attn", source, "flash-attn")
    found = package_status(BY_NAME["flash_attn"])
    assert (found.status, found.version) == (status, "1.2")
    assert note in found.note


def test_the_apex_of_the_package_index_is_recognised(site):
    add(site, "apex", "", "apex", summary="Pyramid toolkit to add Velruse, ReCaptcha and Sessions")
    status = package_status(BY_NAME["apex"])
    assert status.status == "unusable"
    assert "not NVIDIA's apex" in status.note


def test_nvidia_apex_is_accepted(site):
    (add(site, "apex", "", "apex", summary="PyTorch Extensions") / "optimizers").mkdir()
    assert package_status(BY_NAME["apex"]).status == "present"


def test_files_gone_but_metadata_left(site):
    add(site, "unrelated", "", "broken-package")
    status = package_status(OptionalPackage("x", "broken_package", ("broken-package",), "y"))
    assert status.status == "unusable"
    assert "module broken_package is missing" in status.note


def test_looking_does_not_import_the_package(site):
    add(site, "broken_package", "raise SystemError('imported')", "broken-package")
    assert package_status(OptionalPackage("x", "broken_package", ("broken-package",), "y")).status == "present"


def test_two_builds_of_dali_in_one_folder_are_told(site):
    for build in ("nvidia-dali-cuda120", "nvidia-dali-cuda130"):
        info = site / f"{build.replace('-', '_')}-2.4.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {build}\nVersion: 2.4\n")
    fault = BY_NAME["dali"].inspect(None, None)
    assert "nvidia-dali-cuda130 and nvidia-dali-cuda120 share one folder" in fault


def test_image_decoders_are_reported_with_the_reason_why_not(monkeypatch):
    monkeypatch.setattr(dali_pipeline, "why_unusable", lambda device: None if device == "cpu" else "no [GPU]")
    rows = doctor.examine()["loaders"]
    assert [(row["loader"], row["device"], row["status"]) for row in rows] == [
        ("pil", "cpu", "available"),
        ("dali", "cpu", "available"),
        ("dali", "cuda", "no [GPU]"),
    ]
    monkeypatch.setenv("COLUMNS", "300")
    assert "no [GPU]" in CliRunner().invoke(doctor.command, []).output
