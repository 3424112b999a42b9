"""Every Triton kernel compiles for A100, Hopper and Blackwell, and none gets worse than the committed table says."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

import pytest

from cosmos_kernels.machine_code import _without_arguments
from cosmos_kernels.triton_support import MAX_SHARED_BYTES
from tests.kernels import resources

ROW = {
    "module": "toy_triton",
    "case": "forward",
    "arch": 90,
    "registers": 128,
    "stack_bytes": 0,
    "local_accesses": 0,
    "shared_bytes": 49152,
    "mma": {"HGMMA": 8},
}


NEEDS_TRITON = pytest.mark.skipif(
    not sys.platform.startswith("linux") or find_spec("triton") is None,
    reason="Triton is not installed, or cannot compile on this system",
)


@pytest.fixture(scope="module")
def compiled():
    """Rows of all kernels; of those that are not what they were when the table was made, compiled anew."""
    return resources.by_compiler(resources.compile_all(known=True))


@NEEDS_TRITON
@pytest.mark.slow
def test_no_kernel_is_worse_than_the_table_and_all_are_in_it(compiled):
    """To accept new figures: make kernel-resources."""
    part, table = resources.triton_part(), resources.load()
    if part in table:
        assert resources.complaints(compiled.get(part, []), table[part]) == []
    else:  # another version of Triton: its registers are its own, but the kernels are the same
        listed = {resources.key(row) for name in table if name.startswith("triton") for row in table[name]}
        assert {resources.key(row) for row in compiled.get(part, [])} == listed


@NEEDS_TRITON
@pytest.mark.long
def test_what_the_table_says_is_what_the_compiler_makes(tmp_path, monkeypatch):
    """Four minutes, where Triton has not compiled them before."""
    part, table = resources.triton_part(), resources.load()
    if part not in table:
        pytest.skip(f"the table has no figures of {part}")
    found = resources.by_compiler(resources.compile_all("triton"))[part]
    assert resources.complaints(found, table[part]) == []
    changed = [row for row in found if row.get("inputs") not in {known.get("inputs") for known in table[part]}]
    assert [row for row in found if row not in table[part] and row not in changed] == []


def test_what_an_a100_runs_fits_gpus_with_less_shared_memory():
    """A10, L4, L40S and RTX 4090 take their products' operands from registers as A100 does, with 99 KiB a block."""
    triton = [row for name, rows in resources.load().items() if name.startswith("triton") for row in rows]
    too_much = {row["case"] for row in triton if row["arch"] == 80 and row["shared_bytes"] > MAX_SHARED_BYTES[89]}
    assert too_much == {
        "gradients_kernel/L196",  # with half the rows there
        "forward_kernel/197x197/d128/full/share1/32x256",  # refused there
    }
    assert {row["case"] for row in triton if row["arch"] == 89} == {
        "attend_kernel/L196",
        "weights_kernel/L196/M32",
        "gradients_kernel/L196/M32",
    }


def test_every_version_of_triton_in_the_table_lists_the_same_kernels():
    parts = {name: rows for name, rows in resources.load().items() if name.startswith("triton")}
    listed = {name: sorted(resources.key(row) for row in rows) for name, rows in parts.items()}
    assert len({tuple(keys) for keys in listed.values()}) <= 1, listed


@NEEDS_TRITON
@pytest.mark.slow
def test_cuda_kernels_are_no_worse_than_the_table(compiled):
    if reason := resources.why_library_is_stale():
        pytest.skip(reason)
    parts = [name for name in compiled if name.startswith("nvcc")]
    table = resources.load()
    if not parts or parts[0] not in table:
        pytest.skip(f"the table has no figures of {parts or 'a compiler that is not here'}")
    assert resources.complaints(compiled[parts[0]], table[parts[0]]) == []


KNOWN = """
import sys
from dataclasses import replace
from tests.kernels.toy_kernels import COMPILE_AHEAD
from cosmos_kernels import compile_ahead
from cosmos_kernels.compile_ahead import Resources, inputs_of

case = COMPILE_AHEAD[0]
others = [replace(case, num_warps=8), replace(case, constexprs={**case.constexprs, "K": 256}), COMPILE_AHEAD[1]]
others += [replace(case, signature={**case.signature, "n": "i64"}), replace(case, divisible_by_16=("n",))]
hashes = {inputs_of("toy", one, arch) for one in (case, *others) for arch in (80, 90)}
assert len(hashes | {inputs_of("toy", case, 80)}) == 12

compiled = []
def compile_case(module, case, arch):
    compiled.append(arch)
    return Resources(module=module, case=case.name, arch=arch, registers=9, stack_bytes=0, local_accesses=0,
                     shared_bytes=0, mma={})

compile_ahead.compile_case = compile_case
compile_ahead.cases = lambda only: [("toy", case)]
table = compile_ahead.Path(sys.argv.pop())
sys.argv[1:] = ["--only=toy", "--known", str(table)]
compile_ahead.main()
rows = [{"inputs": inputs_of("toy", case, 80), "registers": 7}, {"inputs": "of another kernel", "registers": 7}]
table.write_text(compile_ahead.json.dumps({"triton": rows}))
compile_ahead.main()
print(compiled)
"""


@NEEDS_TRITON
@pytest.mark.slow
def test_a_kernel_is_compiled_again_where_its_inputs_have_changed(tmp_path):
    told = resources.run_without_interpreter(["-c", KNOWN, str(tmp_path / "table.json")]).splitlines()
    *rows, compiled = [json.loads(line) for line in told]
    assert compiled == [80, 90, 100, 90, 100]
    assert [row["registers"] for row in rows] == [9, 9, 9, 7, 9, 9]
    assert rows[1:3] == rows[4:]


TOY = """
from tests.kernels.toy_kernels import COMPILE_AHEAD
from cosmos_kernels.compile_ahead import asdict, compile_case, json
for case in COMPILE_AHEAD:
    for arch in case.archs:
        try:
            print(json.dumps(asdict(compile_case("toy", case, arch))))
        except RuntimeError as error:
            print(json.dumps(str(error)))
"""


@pytest.mark.slow
@NEEDS_TRITON
def test_the_tool_sees_spills_tensor_cores_and_wrong_cases():
    found = [json.loads(line) for line in resources.run_without_interpreter(["-c", TOY]).splitlines()]
    fits_80, fits_90, fits_100, spilling, wrong = found
    assert [list(row["mma"]) for row in (fits_80, fits_90, fits_100)] == [["HMMA"], ["HGMMA"], ["UTCHMMA"]]
    assert not any(resources.spills(row) for row in (fits_80, fits_90, fits_100))
    assert all(0 < row["registers"] <= 255 and row["shared_bytes"] > 0 for row in (fits_80, fits_90, fits_100))
    assert spilling["stack_bytes"] > 0
    assert spilling["local_accesses"] > 0
    assert wrong == (
        "toy: forgets an argument for sm_80: AssertionError: "
        "arguments that only the kernel or only the case has: ['BLOCK_Q']"
    )


def test_the_page_shows_the_table():
    assert resources.PAGE.read_text() == resources.render(resources.load())


def test_a_new_spill_a_lost_tensor_core_and_a_missing_kernel_are_complaints():
    worse = [
        {**ROW, "stack_bytes": 88, "local_accesses": 44},
        {**ROW, "case": "backward", "mma": {}},
        {**ROW, "case": "new"},
    ]
    before = [ROW, {**ROW, "case": "backward"}, {**ROW, "case": "removed"}]
    assert resources.complaints(worse, before) == [
        "toy_triton: backward on sm_90: no tensor-core instruction left, had {'HGMMA': 8}",
        "toy_triton: forward on sm_90: spills 88 bytes, did not before",
        "toy_triton: new on sm_90: not in the table",
        "toy_triton: removed on sm_90: in the table, but gone",
    ]


def test_what_stays_or_gets_better_is_no_complaint():
    spilling = {**ROW, "stack_bytes": 88}
    assert resources.complaints([ROW], [spilling]) == []
    assert resources.complaints([{**ROW, "registers": 255, "shared_bytes": 200_000}], [ROW]) == []
    assert resources.complaints([{**spilling, "stack_bytes": 200}], [spilling]) == []


def test_a_kernel_that_stops_compiling_is_a_complaint_until_the_table_says_so():
    broken = {"module": "toy_triton", "case": "forward", "arch": 90, "error": "PassManager::run failed"}
    assert resources.complaints([broken], [ROW]) == [
        "toy_triton: forward on sm_90: does not compile: PassManager::run failed"
    ]
    assert resources.complaints([broken], [broken]) == resources.complaints([ROW], [broken]) == []
    assert "**does not compile**" in resources.render({"triton 3.6": [broken]})


def test_the_newest_triton_of_the_table_compiles_everything():
    parts = {name: rows for name, rows in resources.load().items() if name.startswith("triton")}
    newest = max(parts, key=lambda name: [int(number) for number in name.split()[1].split(".")], default="")
    assert [resources.key(row) for row in parts.get(newest, []) if "error" in row] == []


def test_the_table_is_written_a_row_a_line_and_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "TABLE", tmp_path / "table.json")
    monkeypatch.setattr(resources, "PAGE", tmp_path / "page.md")
    assert resources.load() == {}
    rows = [ROW, {**ROW, "arch": 80, "stack_bytes": 16, "mma": {}, "shared_bytes": 0}]
    resources.write({"triton 3.9": rows})
    assert resources.load() == {"triton 3.9": rows}
    assert json.dumps(ROW) + "," in resources.TABLE.read_text().splitlines()
    page = resources.PAGE.read_text()
    assert "| kernel | sm_80 | sm_90 |" in page
    assert "| toy_triton `forward` | 128 regs, **spills 16 B** | 128 regs, 48 KiB, 8 HGMMA |" in page


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void (anonymous namespace)::step<true>(Table, float const*)", "step<true>"),
        ("void cosmos::pool<(cosmos::Dtype)64, (bool)1>(float*)", "cosmos::pool<64, 1>"),
        ("plain", "plain"),
    ],
)
def test_names_of_cuda_kernels_are_short(signature, name):
    assert _without_arguments(signature) == name
