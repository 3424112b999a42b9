"""A segmentation protocol of one's own, in place of a set's: `--protocol KEY=VALUE`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from cosmos_fast.evaluate.datasets.sets import EvalSet, SegmentationSet
from cosmos_fast.utils.errors import UserError

# Key -> what its value is, in words, and whether a value is one.
_SHARE = ("a share from 0 up to, but not, 1", lambda value: _number(value) and 0 <= value < 1)
KEYS: Mapping[str, tuple[str, Any]] = {
    "csa": ("true or false", lambda value: isinstance(value, bool)),
    "scale": ("a number above 0", lambda value: _number(value) and value > 0),
    "prob_threshold": _SHARE,
    "area_threshold": _SHARE,
    "short_side": ("a number of windows, 1 or more", lambda value: _number(value) and value >= 1),
    "stride": ("a share of a window above 0, at most 1", lambda value: _number(value) and 0 < value <= 1),
    "interpolation": ("bilinear or bicubic", lambda value: value in ("bilinear", "bicubic")),
    "pamr_steps": ("a whole number, 0 is off", lambda value: _whole(value) and value >= 0),
}


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and abs(value) < float("inf"))


def parse(changes: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts -> fields of SegmentationProtocol. UserError: no such key, no such value."""
    found: dict[str, Any] = {}
    for text in changes:
        key, equals, written = text.partition("=")
        if key not in KEYS or not equals:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.0)[0]
            raise UserError(f"--protocol {text}: give KEY=VALUE, KEY one of {', '.join(KEYS)} (did you mean {near}?)")
        words, fits = KEYS[key]
        try:
            value = yaml.safe_load(written)
        except yaml.YAMLError:
            value = None
        if not fits(value):
            raise UserError(f"--protocol {text}: {key} is {words}")
        found[key] = value
    return found


def with_protocol(sets: Mapping[str, EvalSet], changes: Sequence[str]) -> dict[str, EvalSet]:
    """The sets, those of segmentation with some fields of their protocol changed. UserError: there is no such set, or a
    threshold for one without a background."""
    fields = parse(changes)
    if fields and not any(isinstance(found, SegmentationSet) for found in sets.values()):
        raise UserError(f"--protocol {changes[0]} is for segmentation: give a --benchmark of it, or leave it out")
    threshold = next((key for key in ("prob_threshold", "area_threshold") if fields.get(key)), None)
    bare = [name for name, found in sets.items() if isinstance(found, SegmentationSet) and not found.background]
    if threshold and bare:
        raise UserError(
            f"--protocol {threshold}={fields[threshold]}: no background in {', '.join(bare)} to give pixels to: leave "
            "it out, or give sets with a background alone"
        )
    changed: dict[str, EvalSet] = dict(sets)
    for name, found in sets.items():
        if isinstance(found, SegmentationSet):
            changed[name] = replace(found, protocol=replace(found.protocol, **fields))
    return changed
