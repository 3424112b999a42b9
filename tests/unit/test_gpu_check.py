"""gpu-check without a GPU: its clock, and what it leaves behind when parts fail, hang, crash or are missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_run, tally
from benchmarks.gpu_plan import Step, groups, plan
from benchmarks.gpu_report import Place, Report
from benchmarks.gpu_run import (
    FAILED,
    KILL_S,
    NO_TIME,
    NOT_YET,
    PASSED,
    STOPPED,
    Folders,
    Outcome,
    allowance,
    run_all,
)
from tests.hand_clock import HandClock
from tests.lives import is_running

ROOT = Path(__file__).parents[2]
ROW = {
    "name": "infonce", "device": "NVIDIA Test", "shapes": {}, "metric": "forward_backward_ms/1024", "value": 1.0,
    "unit": "ms", "baseline": "eager port", "ratio": 0.05, "floor_pct": None, "bar": 0.1, "commit": "c", "versions": {},
}  # fmt: skip


def step(name, code="", limit_s=200.0, least_s=1.0, **others):
    return Step(name=name, command=("-c", code), limit_s=limit_s, least_s=least_s, **others)


def check(steps, tmp_path, total_s=3000.0, packed=False, **how):
    """A whole check in a folder; returns what stands in the JSON."""
    place = Place(tmp_path / "left", packed)
    folders = Folders.below(tmp_path / "work")
    report = Report({"device": "NVIDIA Test"}, steps, folders, place)
    report.write()
    run_all(steps, folders, report, total_s, **how)
    return json.loads((tmp_path / "left" / "gpu_check.json").read_text())


def statuses(content):
    return [entry["status"] for entry in content["steps"]]


@pytest.mark.parametrize("overrun_s", [0.0, KILL_S])
def test_nine_minutes_hold_and_all_get_their_least_even_if_every_step_hangs(tmp_path, monkeypatch, overrun_s):
    """Each step takes all that it may, and dies as late as is allowed for."""
    clock, given = HandClock(monkeypatch), {}
    monkeypatch.setattr(gpu_run, "why_not", lambda step: None)

    def hang(step, allowed_s, folders):
        given[step.name] = allowed_s
        clock.pass_s(allowed_s + overrun_s)
        return Outcome(name=step.name, status=STOPPED)

    steps = plan()
    start_s = clock()
    content = check(steps, tmp_path, gpu_check.TOTAL_S, clock=clock, run=hang, side_by_side=1)
    assert clock() - start_s <= gpu_check.TOTAL_S < 9 * 60
    leaders = {members[0].name: members[0] for members in groups(steps)}
    assert all(given[name] >= leader.least_s for name, leader in leaders.items())
    found = {entry["name"]: entry["status"] for entry in content["steps"]}
    assert {found[name] for name in leaders} == {STOPPED}
    assert {found[name] for name in found.keys() - leaders.keys()} == {NO_TIME}  # the first one took the group's time


def test_what_a_step_may_take_never_passes_the_deadline():
    """Whatever the limits, and wherever the clock stands: given plus killing fits what remains."""
    group, later = [step("a", limit_s=100, least_s=10)], [[step("b", least_s=30)]]
    assert allowance(group, later, 500) == 100
    assert allowance(group, later, 90) == 90 - 30 - 2 * KILL_S
    assert allowance(group, later, 10 + KILL_S) == 10  # the first goes before the last
    assert allowance(group, later, 9 + KILL_S) == 0
    for remaining_s in range(-5, 200):
        allowed_s = allowance(group, later, remaining_s)
        assert allowed_s == 0 or 10 <= allowed_s <= remaining_s - KILL_S


def test_no_time_is_kept_for_what_cannot_run_here(tmp_path, monkeypatch):
    clock, given = HandClock(monkeypatch), {}

    def run(step, allowed_s, folders):
        given[step.name] = allowed_s
        return Outcome(name=step.name, status=PASSED)

    lacks = {"modules": ("no_such_module_here",), "least_s": 50.0}
    steps = [
        step("first"),
        step("lacks", **lacks),
        step("x lacks", together="tests", **lacks),
        step("y", least_s=10.0, together="tests"),
    ]
    content = check(steps, tmp_path, 100, clock=clock, run=run)
    assert given["first"] == 100 - 10 - 2 * KILL_S
    missing = "not run: no package no_such_module_here"
    assert statuses(content) == [PASSED, missing, missing, PASSED]


def test_what_gets_no_turn_says_so(tmp_path, monkeypatch):
    """The first takes far more than it was given, as no process can be made not to; the rest is told, not lost."""
    clock = HandClock(monkeypatch)

    def late(step, allowed_s, folders):
        clock.pass_s(10_000)
        return Outcome(name=step.name, status=PASSED)

    steps = [step("first"), step("second"), *(step(name, together="tests") for name in "xy"), step("last")]
    content = check(steps, tmp_path, 100, clock=clock, run=late)
    assert statuses(content) == [PASSED, *[NO_TIME] * 4]
    assert NO_TIME == "not run: out of time"


def test_steps_of_a_group_share_its_time_and_run_side_by_side(tmp_path):
    # None ends before all have begun.
    code = (
        "import sys, time; from pathlib import Path; begun = Path(sys.argv[1]); (begun / sys.argv[2]).touch()\n"
        "while len(list(begun.glob('begun_*'))) < 4: time.sleep(0.01)"
    )
    steps = [
        Step(name=name, command=("-c", code, "{out}", f"begun_{name}"), limit_s=200, least_s=1, together="tests")
        for name in "abcd"
    ]
    content = check(steps, tmp_path, side_by_side=4)
    assert statuses(content) == [PASSED] * 4


def has_ended(pid_file):
    """Whether a process ends soon, if it has not: a kill is not waited for by who sends it."""
    pid, deadline = int(pid_file.read_text()), time.monotonic() + 120
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


def wait_for(files, seconds=300):
    """Until each of them is there and not empty."""
    deadline = time.monotonic() + seconds
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_failing_hanging_crashing_and_missing_parts_leave_the_others_results(tmp_path, monkeypatch):
    grandchild = tmp_path / "pid"
    hang = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun');"
        # It leaves the process group, as compilers' servers do.
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'], start_new_session=True);"
        f"open({str(grandchild)!r}, 'w').write(str(child.pid)); time.sleep(3600)"
    )

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            """The time of the one that hangs runs out when it has come that far, and not before."""
            wait_for([grandchild] if self.args[-1] == hang else [])
            return super().wait(timeout)

    monkeypatch.setattr(gpu_run.subprocess, "Popen", Process)
    row = f"open(sys.argv[1] + '/infonce.json', 'w').write({json.dumps([ROW])!r})"
    steps = [
        Step(name="good", command=("-c", f"import sys; {row}; print('fine')", "{out}"), limit_s=200, least_s=1),
        step("bad", "raise SystemExit('broken')"),
        step("hangs", hang, limit_s=1.0),
        step("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        step("needs", modules=("json", "no_such_module_here"), programs=("no_such_program",)),
        step("last", "import os; assert 'TRITON_INTERPRET' not in os.environ"),
    ]
    content = check(steps, tmp_path)
    missing = "not run: no package no_such_module_here, no program no_such_program"
    assert statuses(content) == [PASSED, FAILED, STOPPED, f"{FAILED}: ended by SIGSEGV", missing, PASSED]
    told = {entry["name"]: entry["output_tail"] for entry in content["steps"]}
    assert "fine" in told["good"]
    assert "broken" in told["bad"]
    assert "begun" in told["hangs"]
    assert has_ended(grandchild)
    assert content["rows"] == [ROW]
    verdicts = {bar["bar"]: bar["verdict"] for bar in content["bars"]}
    assert verdicts["80 pairwise losses, 1024 samples"] == "met"
    assert verdicts["80 pairwise losses, 4096 samples"] == "not measured"


def test_the_report_is_there_from_the_start_and_after_every_step(tmp_path):
    path = tmp_path / "left" / "gpu_check.json"
    look = f"import json; print([s['status'] for s in json.load(open({str(path)!r}))['steps']])"
    content = check([step("one", look), step("two", look)], tmp_path)
    assert f"['{NOT_YET}', '{NOT_YET}']" in content["steps"][0]["output_tail"]
    assert f"['passed', '{NOT_YET}']" in content["steps"][1]["output_tail"]


def test_who_is_told_to_stop_ends_its_steps_and_leaves_the_report(tmp_path):
    pids = [tmp_path / name for name in "bc"]
    sleep = [f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(3600)" for pid in pids]
    code = f"""
from pathlib import Path
from benchmarks import gpu_check
from benchmarks.gpu_plan import Step
from benchmarks.gpu_report import Place
from benchmarks.gpu_run import Folders, interruptible
steps = [Step(name=name, command=("-c", code), limit_s=1000, least_s=1, together=together) for name, code, together in
         (("a", "", None), ("b", {sleep[0]!r}, "x"), ("c", {sleep[1]!r}, "x"), ("d", "", None))]
with interruptible():
    folders = Folders.below(Path({str(tmp_path / "work")!r}))
    raise SystemExit(gpu_check.check({{}}, steps, folders, Place(Path({str(tmp_path)!r}), packed=False), 5000.0))
"""
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(pids)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 1
    finally:
        driver.kill()
    assert all(map(has_ended, pids))
    found = {entry["name"]: entry["status"] for entry in json.loads((tmp_path / "gpu_check.json").read_text())["steps"]}
    assert found["a"] == PASSED
    assert found["c"] == found["d"] == "not run: interrupted"


def test_the_budget_is_handed_on_and_old_rows_are_not_counted(tmp_path):
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "old.json").write_text('["row of another day"]')
    code = "import sys; print('budget', sys.argv[1]); open(sys.argv[2] + '/toy.json', 'w').write('[]')"
    given = Step(name="toy", command=("-c", code, "{budget}", "{out}"), limit_s=30, least_s=1)
    content = check([given], tmp_path)
    assert "budget 20" in content["steps"][0]["output_tail"]
    assert content["rows"] == []
    assert (tmp_path / "left" / "toy.json").exists()


def test_an_unreadable_row_file_is_named_and_no_others_are_lost(tmp_path):
    code = f"""import sys
open(sys.argv[1] + '/bad.json', 'w').write('[{{')
open(sys.argv[1] + '/dict.json', 'w').write('{{"a": 1}}')
open(sys.argv[1] + '/lacks.json', 'w').write('[{{"name": "infonce"}}]')
open(sys.argv[1] + '/good.json', 'w').write({json.dumps([ROW])!r})"""
    content = check([Step(name="x", command=("-c", code, "{out}"), limit_s=200, least_s=1)], tmp_path)
    assert content["rows"] == [ROW]
    assert [text.split(":")[0] for text in content["unreadable"]] == ["bad.json", "dict.json", "lacks.json"]


def test_a_folder_of_ones_own_gets_one_json_and_one_archive(tmp_path):
    code = "import sys; open(sys.argv[1] + '/toy.svg', 'w').write('<svg/>'); print('said')"
    toy = Step(name="bench toy", command=("-c", code, "{out}"), limit_s=200, least_s=1)
    check([toy], tmp_path, packed=True)
    left = sorted((tmp_path / "left").iterdir())
    assert [path.name for path in left] == ["gpu_check.json", "gpu_check.tar.gz"]
    with tarfile.open(left[1]) as archive:
        assert {"out/toy.svg", "logs/bench_toy.txt"} <= set(archive.getnames())


def test_kernel_tests_are_counted_as_they_end(tmp_path):
    """Also where the run is killed: what it had is told, and that it was not all."""
    (tmp_path / "test_toy_triton.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False\n@pytest.mark.skip\ndef test_c(): pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError\ndef test_d(broken): pass\n"
    )
    (tmp_path / "test_slow_triton.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(3600)\n")
    options = ("-q", "-p", "no:cacheprovider", "-p", "benchmarks.tally", "--rootdir", str(tmp_path))
    running = {}
    for name in ("slow", "toy"):
        tally_file = tmp_path / f"{name}.jsonl"
        command = [sys.executable, "-m", "pytest", str(tmp_path / f"test_{name}_triton.py"), *options]
        environment = {**os.environ, "COSMOS_TALLY": str(tally_file)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        running[tally_file] = process
    slow, toy = running
    assert running[toy].wait(600) == 1
    while not (slow.exists() and "test_a" in slow.read_text()):
        assert running[slow].poll() is None
        time.sleep(0.02)
    running[slow].kill()
    running[slow].wait()
    slow.write_text(slow.read_text() + '{"test": "tests/x.py::te')  # cut off within a line
    assert tally.read(running) == {
        "test_toy_triton": {"passed": 1, "failed": 2, "skipped": 1, "unfinished": 0},
        "test_slow_triton": {"passed": 1, "failed": 0, "skipped": 0, "unfinished": 1},
    }


def test_counts_of_tests_stand_in_the_report(tmp_path):
    line = json.dumps({"test": "tests/kernels/test_pool_triton.py::test_a", "outcome": "passed", "s": 1.0})
    code = f"import os; open(os.environ['COSMOS_TALLY'], 'w').write({line!r})"
    content = check([step("kernel tests: test_pool_triton", code)], tmp_path)
    assert content["tests"] == {"test_pool_triton": {"passed": 1, "failed": 0, "skipped": 0, "unfinished": 1}}
