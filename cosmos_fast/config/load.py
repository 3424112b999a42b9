"""YAML and `--set key=value` into a TrainConfig, and back."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import yaml

from cosmos_fast.config.train import TrainConfig
from cosmos_fast.utils.errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

# Places that hold sources and take a bare path, or a list of paths, as a shorthand.
_SOURCE_LISTS = (("data", "train"), ("evaluate", "data"))
# What holds keys that are not known here: another program's, at any depth, and names of evaluation sets.
_FOREIGN, _NAMED = ("deepspeed.",), ("evaluate.benchmarks.",)


def load_config(source: TrainConfig | Mapping[str, Any] | str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Resolve a configuration.

    source: a TrainConfig (a recipe's), a mapping, or the path of a YAML file. overrides: "dotted.key=value", the value
    in YAML, later ones win. Raises UserError with the nearest valid name for an unknown key, and with the key and the
    reason for a value that does not fit.
    """
    if isinstance(source, TrainConfig):
        tree = asdict(source)
    elif isinstance(source, Mapping):
        tree = _plain(source)
    else:
        tree = _read_yaml(Path(source))
    for override in overrides:
        _apply(tree, override)
    _expand_sources(tree)
    _refuse_unknown_keys(tree, TrainConfig, ())
    _refuse_truth_values("", tree, TrainConfig)
    from pydantic import TypeAdapter, ValidationError  # here: the model and its benchmarks run without it

    try:
        return TypeAdapter(TrainConfig).validate_python(tree)
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML that load_config() reads back as an equal TrainConfig."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True, width=100)


def flatten_config(config: TrainConfig) -> dict[str, Any]:
    """Dotted key -> value, for every key that is not a section."""
    flat: dict[str, Any] = {}

    def visit(section: Any, prefix: str) -> None:
        for name in _hints(type(section)):
            value = getattr(section, name)
            if is_dataclass(value):
                visit(value, f"{prefix}{name}.")
            else:
                flat[prefix + name] = value

    visit(config, "")
    return flat


def dotted_names(cls: type = TrainConfig, prefix: str = "") -> list[str]:
    """Every key that `--set` takes, sections included."""
    names = []
    for name, hint in _hints(cls).items():
        names.append(prefix + name)
        if is_dataclass(hint):
            names.extend(dotted_names(hint, f"{prefix}{name}."))  # type: ignore[arg-type]
    return names


def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}  # type: ignore[arg-type]


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which the last would count."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """As the base has it; what `<<` merges, which may be given again, is not in it yet."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.YAMLError(f"line {line} gives {key.value!r} again, after line {lines[key.value]}: keep one")
            lines[key.value] = line
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError:
        raise UserError(f"configuration file {path} does not exist: check the path, or use --recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"configuration file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"configuration file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"configuration file {path} must hold keys and values, not {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {override!r} is not of the form key=value")
    *sections, last = key.split(".")
    if key.startswith((*_FOREIGN, *_NAMED)):
        _set_below(tree, sections, last, text if key.startswith(_NAMED) else _yaml_value(text), override)
        return
    node, cls = tree, TrainConfig
    for section in sections:
        hint = _hints(cls).get(section)
        if not is_dataclass(hint):
            raise _unknown_key(key)
        node, cls = node.setdefault(section, {}), hint  # type: ignore[assignment]
        if not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {section!r} is not a section in the configuration file")
    if last not in _hints(cls):
        raise _unknown_key(key)
    value = text if _hints(cls)[last] is str else _yaml_value(text)
    if is_dataclass(_hints(cls)[last]) and not isinstance(value, dict):
        raise UserError(f"--set {override!r}: {key} is a section, set one of its keys, such as {dotted_example(key)}")
    node[last] = value


def _set_below(tree: dict[str, Any], sections: list[str], last: str, value: Any, override: str) -> None:
    """Set a key of a tree of dicts, making those that are missing."""
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override!r}: {section!r} is not a section in the configuration")
    node[last] = value


def _yaml_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # a path such as {a,b}/{0..9}.tar is no YAML, and means itself


def dotted_example(section: str) -> str:
    """One key inside `section`, for error messages."""
    return next(name for name in dotted_names() if name.startswith(section + "."))


def _unknown_key(key: str) -> UserError:
    names = dotted_names()
    by_last_part = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = by_last_part or difflib.get_close_matches(key, names, n=1, cutoff=0.0)
    return UserError(f"unknown configuration key {key!r}: did you mean {near[0]!r}?")


def _refuse_unknown_keys(tree: Mapping[str, Any], cls: type, path: tuple[str, ...]) -> None:
    hints = _hints(cls)
    for key, value in tree.items():
        if key not in hints:
            raise _unknown_key(".".join((*path, str(key))))
        if is_dataclass(hints[key]) and isinstance(value, Mapping):
            _refuse_unknown_keys(value, hints[key], (*path, key))  # type: ignore[arg-type]
    missing = [f.name for f in fields(cls) if _required(f) and f.name not in tree]  # type: ignore[arg-type]
    if missing:
        raise UserError(f"configuration key {'.'.join((*path, missing[0]))!r} is missing: set it")


def _refuse_truth_values(key: str, value: Any, hint: Any) -> None:
    """In the place of numbers, where pydantic takes True for 1: YAML reads yes, on, no and off as truth values too."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
        raise UserError(f"configuration key {key!r} is {value} (so YAML reads yes, on, no, off): give a number")
    for kind in kinds:
        if is_dataclass(kind) and isinstance(value, Mapping):
            for name, below in _hints(kind).items():  # type: ignore[arg-type]
                _refuse_truth_values(f"{key}.{name}" if key else name, value.get(name), below)
        elif get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            for place, item in enumerate(value):
                _refuse_truth_values(f"{key}.{place}", item, get_args(kind)[0])


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _expand_sources(tree: dict[str, Any]) -> None:
    for section, key in _SOURCE_LISTS:
        node = tree.get(section)
        if not isinstance(node, dict) or node.get(key) is None:
            continue
        given = node[key]
        items = list(given) if isinstance(given, (list, tuple)) else [given]
        node[key] = [_expand_source(f"{section}.{key}", item) for item in items]


def _expand_source(where: str, item: Any) -> dict[str, Any]:
    source = {"path": item} if isinstance(item, str) else item
    if not isinstance(source, dict) or not isinstance(source.get("path"), str):
        raise UserError(f"{where} holds {item!r}: give a path, or {{path: ..., weight: ..., schema: ...}}")
    unknown = sorted(set(source) - {"path", "weight", "schema"})
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r} of a source, known are path, weight, schema")
    return source


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    key = ".".join(str(part) for part in problem["loc"])
    return f"configuration key {key!r} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _plain(value: Any) -> Any:
    """Tuples as lists, mappings as dicts: what YAML can hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
