"""What a GPU check runs, in which order, and what it needs on the machine: without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import build_cuda, gpu_check, gpu_plan, machine, product, rehearsal, step_setting, sweeps, tally
from benchmarks.gpu_plan import plan
from benchmarks.gpu_run import Folders
from benchmarks.shapes import mini_step

ROOT = Path(__file__).parents[2]


def test_the_plan_builds_then_tests_then_measures_what_has_bars_and_leaves_nothing_out():
    steps = plan()
    names = [step.name for step in steps]
    tests = [name for name in names if name.startswith("kernel tests")]
    assert names[0] == "build"
    assert names[1 : 1 + len(tests)] == tests
    barred = ["infonce", "pool", "attention", "optimizer", "layer_norm", "step", "step", "distill"]
    assert [name.split()[1] for name in names[1 + len(tests) :][:8]] == barred
    assert {f"bench {path.stem[6:]}" for path in (ROOT / "benchmarks").glob("bench_*.py")} <= {
        " ".join(name.split()[:2]) for name in names
    }
    assert {f"sweep {name}" for name in sweeps.SWEEPS} <= set(names)
    assert len(names) == len(set(names))
    outs = [path for step in steps for path in step.command if path.endswith(".json")]
    assert len(outs) == len(set(outs))


def test_every_kernel_test_that_needs_a_gpu_is_run_once_in_a_process_of_its_own():
    commands = [step.command for step in plan() if "pytest" in step.command]
    paths = [[part for part in command if part.startswith("tests/")] for command in commands]
    assert all(len(found) == 1 and (ROOT / found[0]).exists() for found in paths)
    everything = {path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    left_out = everything - {Path(found[0]).name for found in paths}
    assert all("emulated" in name or "compile_ahead" in name for name in left_out)


@pytest.mark.parametrize("xdist", [True, False])
def test_the_modules_that_compile_longest_are_spread_over_processes_where_xdist_is(monkeypatch, xdist):
    monkeypatch.setattr(gpu_plan, "find_spec", lambda name: object() if xdist and name == "xdist" else None)
    tests = [step for step in plan() if "pytest" in step.command]
    spread = {Path(step.command[2]).stem for step in tests if step.command[-4:-2] == ("-n", "4")}
    large = {f"test_{name}_triton" for name in ("attention", "pool", "infonce", "distill")}
    assert spread == (large if xdist else set())


def test_tests_that_are_spread_over_processes_are_counted_like_others(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_toy_triton.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(6))\ndef test_a(i): assert i\n"
        "@pytest.mark.skip\ndef test_b(): pass\n"
    )
    tally_file = tmp_path / "toy.jsonl"
    options = ("-q", "-p", "no:cacheprovider", "-p", "benchmarks.tally", "-n", "2", "--dist", "load")
    command = [sys.executable, "-m", "pytest", str(tmp_path), *options, "--rootdir", str(tmp_path)]
    environment = {**os.environ, "COSMOS_TALLY": str(tally_file)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert tally.read([tally_file]) == {"test_toy_triton": {"passed": 5, "failed": 1, "skipped": 1, "unfinished": 0}}


def test_the_parts_of_a_check_in_several_calls_are_the_whole_one():
    steps = plan()
    parts = {name: [step.name for step in gpu_plan.only(name, steps)] for name in gpu_plan.PARTS}
    for name, found in parts.items():
        assert found.pop(0) == "build"
        assert name == "tests" or found.pop() == "report"  # tests alone leave no rows to show
        assert all(step.startswith(("kernel tests", "bench ", "sweep ")) for step in found)
        assert len({step.split()[0] for step in found}) == 1, name
    once = [step for found in parts.values() for step in found]
    assert sorted(once) == sorted(step.name for step in steps[1:-1])


def test_a_part_leaves_files_of_its_own_name(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(gpu_check, "probe", lambda folders: {"device": "NVIDIA Test"})
    monkeypatch.setattr(gpu_check, "run_all", lambda steps, *_: made.extend(step.name for step in steps))
    for name in gpu_plan.PARTS:
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", name, "--out", str(tmp_path)])
        gpu_check.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"gpu_check_{name}.{kind}" for name in gpu_plan.PARTS for kind in ("json", "tar.gz")
    )
    assert len(made) == len(plan()) + 3


def test_a_machine_without_gpu_is_told_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "probe", lambda folders: {"error": "no usable CUDA device"})
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert "error: no usable CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--dry-run"])
    assert gpu_check.main() == 0
    assert "kernel tests" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--rehearse"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print('a warning'); print('{\"device\": \"X\"}'); print('another')", "X"),
        ("raise SystemExit('no driver')", "no driver"),
        ("import time; time.sleep(3600)", "its time was up"),
    ],
)
def test_the_machine_is_asked_in_a_process_that_may_hang(tmp_path, monkeypatch, code, told):
    monkeypatch.setattr(gpu_check, "PROBE_S", 0.2 if "sleep" in code else 600.0)
    monkeypatch.setattr(gpu_check, "PROBE", ("-c", code))
    found = gpu_check.probe(Folders.below(tmp_path))
    assert told in (found.get("device") or found["error"])
    assert json.dumps(machine.versions())


# What may be missing on a machine with a GPU: everything of ours but torch, numpy, Triton, click, PyYAML, safetensors.
BLOCKED = (
    "pydantic", "ftfy", "webdataset", "braceexpand", "matplotlib", "jinja2", "tokenizers", "PIL",
    "omegaconf", "regex", "tensorboard", "deepspeed", "rich", "tqdm", "packaging",
)  # fmt: skip


def test_every_step_imports_on_a_machine_without_our_installation():
    modules = [path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")] + ["sweeps", "build_cuda", "machine"]
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
for name in {modules!r}:
    __import__("benchmarks." + name)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_check_itself_imports_nothing_beyond_python():
    """So that no driver, compiler or missing package can hang or break what keeps the time."""
    code = (
        "import sys; before = set(sys.modules); import benchmarks.gpu_check, benchmarks.machine;"
        "print({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names - {'benchmarks'})"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_it_runs_as_a_file_without_being_told_where_things_lie(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", str(ROOT / "benchmarks" / "gpu_check.py"), "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"at most {gpu_check.TOTAL_S:.0f} s" in done.stdout
    assert len(gpu_plan.rehearsed(plan())) == len(plan()) - 1


@pytest.mark.parametrize("make", [step_setting.make_port, step_setting.make_product])
def test_the_models_of_a_step_draw_their_weights_on_its_device(monkeypatch, make):
    """On the host that took most of the seconds that the step has."""

    class Made(Exception):
        pass

    def look(*_):
        raise Made(torch.empty(0).device.type)

    monkeypatch.setattr(step_setting, "EagerCosmos", look)
    monkeypatch.setattr(product, "create_model", look)
    with pytest.raises(Made, match="meta"):
        make(step_setting.Setting("toy", mini_step(64, 1, 2), "meta", "fp32"))
    with rehearsal.played_by_cpu(), product.made_on("cuda"):
        assert torch.randn(1).device.type == "cpu"


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100a"), ((12, 0), "120a")]
)
def test_architectures_have_the_names_that_nvcc_knows(capability, name):
    assert build_cuda.architecture(*capability) == name


def test_the_library_is_built_from_every_source_as_cmake_does():
    assert [path.suffix for path in build_cuda.sources()] == [".cu"] * len(build_cuda.sources())
    assert "csrc/adamw_ema_cuda.cu" in {str(path.relative_to(ROOT)) for path in build_cuda.sources()}
    assert "file(GLOB COSMOS_CUDA_SOURCES CONFIGURE_DEPENDS csrc/*.cu)" in (ROOT / "CMakeLists.txt").read_text()
