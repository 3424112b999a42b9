"""What `auto` takes for packed attention on a GPU, which is played here: by capability, by type, by what is there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cosmos_fast.ops import attention_flash, attention_limits, attention_varlen, attention_xformers
from cosmos_fast.ops.attention import OP
from cosmos_fast.ops.backends import Resolution, resolve

NEVER_MEASURED = "NVIDIA Nothing"
FLASH_2, FLASH_3, VARLEN, XFORMERS = "flash_attn", "flash_attn_3", attention_varlen.MODULE, "xformers"
ALL = {FLASH_2, FLASH_3, VARLEN, XFORMERS}
CACHED = (
    attention_limits.why_no_gpu,
    attention_flash.why_unavailable,
    attention_flash.flash_function,
    attention_varlen.why_unavailable,
    attention_xformers.why_unavailable,
)
Play = Callable[[tuple[int, int], set[str]], None]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Play]:
    """A machine with a GPU of this capability and these packages."""

    def machine(capability: tuple[int, int], there: set[str]) -> None:
        def why_unusable(name: str) -> str | None:
            return None if name in there else f"{name} is not installed"

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: NEVER_MEASURED)
        monkeypatch.setattr(attention_flash, "why_unusable", why_unusable)
        monkeypatch.setattr(attention_xformers, "why_unusable", why_unusable)
        monkeypatch.setattr(attention_varlen, "find_spec", lambda name: name if name in there else None)

    for function in CACHED:
        function.cache_clear()
    yield machine
    for function in CACHED:
        function.cache_clear()


def chosen(dtype: torch.dtype = torch.bfloat16) -> Resolution:
    """For queries of this type on the GPU."""
    queries = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(100, 8, 64))
    return resolve(OP, "auto", *[queries] * 3, torch.empty(77, device="meta"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "there", "dtype", "name"),
    [
        ((9, 0), ALL, torch.bfloat16, "flash"),
        ((8, 0), ALL, torch.float16, "flash"),
        ((9, 0), {FLASH_3}, torch.bfloat16, "flash"),
        ((8, 0), {FLASH_3, VARLEN, XFORMERS}, torch.bfloat16, "varlen"),  # version 3 is for Hopper
        ((8, 0), {XFORMERS}, torch.bfloat16, "xformers"),
        ((7, 5), ALL, torch.float16, "xformers"),
        ((6, 1), ALL, torch.float16, "sdpa"),
        ((9, 0), ALL, torch.float32, "xformers"),
        ((9, 0), ALL, torch.float64, "sdpa"),
        ((9, 0), set(), torch.bfloat16, "sdpa"),  # and not Triton's kernels, which nobody has measured
    ],
)
def test_auto_goes_by_capability_type_and_packages(
    play: Play, capability: tuple[int, int], there: set[str], dtype: torch.dtype, name: str
) -> None:
    play(capability, there)
    assert chosen(dtype).backend.name == name


def test_the_reason_names_what_was_passed_over(play: Play) -> None:
    play((7, 5), {FLASH_2, VARLEN})
    needs = "compute capability 7.5, it needs 8.0 or newer"
    assert chosen().reason.startswith(f"flash: {needs}; varlen: {needs}; xformers: xformers is not installed; ")


@pytest.mark.parametrize(
    ("capability", "there", "module"),
    [
        ((9, 0), ALL, "flash_attn_interface"),
        ((9, 0), {FLASH_2}, "flash_attn"),
        ((8, 0), ALL, "flash_attn"),
        ((10, 0), ALL, "flash_attn"),
    ],
)
def test_version_3_of_flash_attn_runs_on_hopper_only(
    play: Play, capability: tuple[int, int], there: set[str], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(capability, there)
    for name in ("flash_attn_interface", "flash_attn"):
        package = ModuleType(name)
        package.flash_attn_varlen_func = name  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, package)
    assert attention_flash.flash_function() == module
