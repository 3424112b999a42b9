"""Sizes a reader can hold in mind, and nothing of one machine in the tree."""

from __future__ import annotations

import ast
import re

import pytest

from tests.architecture.source_tree import ROOT, python_files, tracked_files, tree

FILE_LINES = {"cosmos_fast": 300, "benchmarks": 300, "kernels": 450, "tests": 300}
FUNCTION_LINES = 60
COMMAND_LINES = 40


def functions(path):
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(node):
    """Lines from the signature's end: options and docstring explain the code, they are not code."""
    body = node.body
    described = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    code = body[1:] if described else body
    return 0 if not code else (code[-1].end_lineno or 0) - code[0].lineno + 1


def is_command(node):
    """`main`, or a function that click turns into a command."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return node.name == "main" or any(re.match(r"(click|\w+)\.(command|group)\(", text) for text in decorators)


@pytest.mark.parametrize("folder", FILE_LINES)
def test_files_are_short(folder):
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in python_files(folder)}
    assert {name: n for name, n in lengths.items() if n > FILE_LINES[folder]} == {}


def test_functions_are_short():
    """Whole functions, docstring included; Triton kernels are excepted."""
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": length
        for path in python_files("cosmos_fast", "kernels", "benchmarks", "tests")
        for node in functions(path)
        if not any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    }
    assert long == {}


def test_commands_only_parse_build_and_run():
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": length
        for path in python_files("cosmos_fast/cli")
        for node in functions(path)
        if is_command(node) and (length := body_lines(node)) > COMMAND_LINES
    }
    assert long == {}


def test_no_machine_paths_in_tracked_files():
    # Spelt in pieces, so that this file does not find itself.
    pattern = re.compile(
        "|".join(["/ho" + r"me/\w+", "/wo" + "rk/", "/opt/" + "dev", "/Us" + r"ers/\w+", "/ro" + "ot/"])
    )
    found = []
    for path in tracked_files():
        if path.suffix in (".safetensors", ".gz", ".png", ".jpg", ".npz"):
            continue
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_no_package_index_is_named():
    """Where packages come from is the machine's business."""
    pattern = re.compile(r"--(extra-)?index-[u]rl|--find-[l]inks")
    files = [
        p for p in tracked_files() if p.name in ("Makefile", "setup.py", "pyproject.toml", "run") or p.suffix == ".md"
    ]
    assert [str(path) for path in files if pattern.search(path.read_text())] == []


def test_every_test_file_asserts_something():
    empty = [
        str(path.relative_to(ROOT))
        for path in python_files("tests")
        if path.name.startswith("test_") and not re.search(r"\bassert|raises\(|\.assert_|gradcheck", path.read_text())
    ]
    assert empty == []
