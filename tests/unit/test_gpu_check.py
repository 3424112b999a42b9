"""gpu-check without a GPU: its plan, its clock, what it leaves behind when parts fail, hang or are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import build_cuda, gpu_check, sweeps
from benchmarks.gpu_check import Step, allowance, run_all

ROOT = Path(__file__).parents[2]


def step(name, code="", limit_s=20.0, least_s=1.0, **others):
    return Step(name=name, command=("-c", code), limit_s=limit_s, least_s=least_s, **others)


def test_the_plan_fits_nine_minutes_and_holds_every_benchmark():
    steps = gpu_check.plan()
    assert gpu_check.TOTAL_S < 9 * 60
    assert sum(step.least_s for step in steps) < gpu_check.TOTAL_S
    names = [step.name for step in steps]
    # Correctness first, of what is new before all; then the whole step, in both settings that have bars.
    assert names[0] == "build"
    assert [name for name in names if "tests" in name] == names[1 : names.index("kernel tests") + 1]
    whole_step = [step for step in steps if step.name.startswith("bench step")]
    assert whole_step == steps[names.index("kernel tests") + 1 :][:2]
    assert {f"bench {path.stem[6:]}" for path in (ROOT / "benchmarks").glob("bench_*.py")} <= {
        " ".join(name.split()[:2]) for name in names
    }
    assert {f"sweep {name}" for name in sweeps.SWEEPS} <= set(names)
    # Even if every step used all it may, the last still gets its least.
    remaining_s = gpu_check.TOTAL_S
    for i, planned in enumerate(steps):
        allowed_s = allowance(planned, steps[i + 1 :], remaining_s)
        assert allowed_s >= planned.least_s
        remaining_s -= allowed_s


def test_every_kernel_test_that_needs_a_gpu_is_run_once():
    commands = [step.command for step in gpu_check.plan() if "pytest" in step.command]
    paths = [part for command in commands for part in command if part.startswith("tests/")]
    assert len(paths) == len(set(paths))
    assert all((ROOT / path).exists() for path in paths)
    everything = {path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    left_out = everything - {Path(path).name for path in paths}
    assert all("emulated" in name or "compile_ahead" in name for name in left_out)


def test_a_step_may_use_what_the_later_ones_can_spare():
    first, later = step("first", limit_s=100, least_s=10), [step("later", least_s=30)]
    assert allowance(first, later, 500) == 100
    assert allowance(first, later, 90) == 60
    assert allowance(first, later, 35) == 10  # the first goes before the last
    assert allowance(first, later, 5) == 0


def test_failing_hanging_and_missing_parts_leave_a_whole_report(tmp_path):
    out = tmp_path / "device" / "gpu_check.json"
    hang = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    steps = [
        step("good", "print('fine')"),
        step("bad", "raise SystemExit('broken')"),
        step("hangs", f"print('begun', flush=True); {hang}; time.sleep(60)", limit_s=2.0),
        step("needs", modules=("json", "no_such_module_here")),
        step("last", "import torch, cosmos_kernels, benchmarks, os; assert 'TRITON_INTERPRET' not in os.environ"),
    ]
    start = time.monotonic()
    outcomes = run_all(steps, {"versions": {}}, out, total_s=60.0)
    assert time.monotonic() - start < 40
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "stopped", "left out", "passed"]
    told = {entry["name"]: entry["output_tail"] for entry in json.loads(out.read_text())["steps"]}
    assert "fine" in told["good"]
    assert "broken" in told["bad"]
    assert "begun" in told["hangs"]
    assert told["needs"] == "no no_such_module_here"


def test_a_step_that_cannot_get_its_least_is_left_out(tmp_path):
    (late,) = run_all([step("late", least_s=50.0, limit_s=50.0)], {}, tmp_path / "gpu_check.json", total_s=10.0)
    assert (late.status, late.output_tail) == ("left out", "no time left")


def test_the_report_is_there_after_every_step(tmp_path):
    out = tmp_path / "gpu_check.json"
    look = f"import json; print([s['name'] for s in json.load(open({str(out)!r}))['steps']])"
    run_all([step("one"), step("two", look)], {}, out)
    assert "['one']" in json.loads(out.read_text())["steps"][1]["output_tail"]


def test_the_budget_and_the_rows_of_benchmarks_are_handed_on(tmp_path):
    out = tmp_path / "gpu_check.json"
    code = f"import sys; print('budget', sys.argv[1]); open({str(tmp_path / 'toy.json')!r}, 'w').write('[1, 2]')"
    given = Step(name="toy", command=("-c", code, "{budget}"), limit_s=30, least_s=1)
    run_all([given], {}, out)
    report = json.loads(out.read_text())
    assert "budget 20" in report["steps"][0]["output_tail"]
    assert report["rows"] == [1, 2]


def test_results_of_kernel_tests_are_counted_by_module(tmp_path):
    (tmp_path / "test_toy_triton.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    assert gpu_check.test_results(tmp_path) == {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=0.xml", str(tmp_path)]
    subprocess.run(command, capture_output=True, cwd=tmp_path)
    (counts,) = gpu_check.test_results(tmp_path).values()
    assert counts == {"passed": 1, "failed": 1, "skipped": 1}


def test_a_machine_without_gpu_is_told_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "why_not_here", lambda: "no usable CUDA device")
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert "no usable CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--dry-run"])
    assert gpu_check.main() == 0
    assert "kernel tests" in capsys.readouterr().out


# What the published GPU images lack of our dependencies.
BLOCKED = ("pydantic", "ftfy", "webdataset", "braceexpand")


def test_every_step_imports_on_a_machine_without_our_installation():
    modules = [path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")] + ["sweeps"]
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


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100a"), ((12, 0), "120a")]
)
def test_architectures_have_the_names_that_nvcc_knows(capability, name):
    assert build_cuda.architecture(*capability) == name


def test_the_library_is_built_from_every_source_as_cmake_does():
    assert [path.suffix for path in build_cuda.sources()] == [".cu"] * len(build_cuda.sources())
    assert "csrc/adamw_ema_cuda.cu" in {str(path.relative_to(ROOT)) for path in build_cuda.sources()}
    assert "file(GLOB COSMOS_CUDA_SOURCES CONFIGURE_DEPENDS csrc/*.cu)" in (ROOT / "CMakeLists.txt").read_text()
