"""Load a model from a file: our checkpoints, released COSMOS `.pt`, OpenCLIP `.pt` and `.safetensors`.

Nothing is unpickled beyond tensors and plain containers (`model.torch_file`), and no model is made before it is known
that the file holds its weights: a small file cannot ask for much memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cosmos_fast.config import ModelConfig
from cosmos_fast.model.cosmos import CosmosModel
from cosmos_fast.model.open_clip_config import described_beside, local_weights
from cosmos_fast.model.stored import FORMAT, MANIFEST, StoredTensors, parts_in
from cosmos_fast.model.torch_file import read_torch_file
from cosmos_fast.model.weights import OPENAI_NUMBERS, check_stored, infer_config, strip_prefixes
from cosmos_fast.utils.errors import UserError
from cosmos_fast.utils.logging import get_logger

WeightsOf = Literal["teacher", "student"]
_log = get_logger(__name__)


def load_checkpoint(path: str | Path, weights: WeightsOf = "teacher") -> CosmosModel:
    """A model in evaluation mode, on the CPU.

    Args:
        path: a run folder (its newest complete checkpoint is taken), a checkpoint folder (in whole files or in the
            parts of several ranks), a `.safetensors` file, or a `.pt` file of COSMOS or OpenCLIP; or such a file on the
            Hugging Face hub, `hf://owner/repository/file`.
        weights: which of the two models of a COSMOS checkpoint; a file that holds one model gives that one.

    Raises:
        UserError: no such file, not a checkpoint, damaged, or weights of another architecture.
    """
    if weights not in ("teacher", "student"):
        raise UserError(f"weights is {weights!r}: choose 'teacher' or 'student'")
    file = find_weights_file(Path(path), weights)
    state_dict, config = _read(file, weights)
    try:
        state_dict = strip_prefixes(state_dict)
        if any(name in state_dict for name in OPENAI_NUMBERS):
            _log.warning("%s holds OpenAI's weights, trained with QuickGELU: exact GELU gives other features", file)
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in OPENAI_NUMBERS}
        model = _model_of(config or infer_config(state_dict, described_beside(file)), state_dict)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return model.eval()


def _model_of(config: ModelConfig, state_dict: Mapping[str, Tensor]) -> CosmosModel:
    """A model with these weights, in fp32."""
    check_stored(config, state_dict)
    with _Unfilled():
        model = CosmosModel(config)
    model.load_reference_state_dict(state_dict)
    return model


class _Unfilled(TorchFunctionMode):
    """New parameters get no random numbers, which take seconds: each of them is loaded."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.randn:
            return torch.empty(*args, **kwargs)
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):  # of tensors, and of torch.nn.init
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def find_weights_file(path: Path, weights: WeightsOf) -> Path:
    """The file that holds the weights a path stands for; of a checkpoint in parts its manifest, which holds the SHA-256
    of each."""
    path = local_weights(path)
    with reading(path):
        if path.is_file():
            return path
        if not path.is_dir():
            raise UserError(f"checkpoint {path} does not exist")
        folder = path
        if (path / "checkpoints").is_dir() or path.name == "checkpoints":
            root = path if path.name == "checkpoints" else path / "checkpoints"
            complete = [step for step in root.glob("step_*") if (step / MANIFEST).is_file()]
            if not complete:
                raise UserError(f"run folder {path} holds no complete checkpoint yet")
            folder = max(complete, key=lambda step: (len(step.name), step.name))
        if (folder / MANIFEST).is_file() and parts_in(folder):
            return folder / MANIFEST
        file = folder / f"{weights}.safetensors"
        if not file.is_file():
            held = ", ".join(sorted(found.name for found in folder.glob("*.safetensors"))) or "no weights"
            raise UserError(f"{folder} has no {file.name} (it holds {held})")
        return file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """UserError where a path may not be entered or read, or is too long."""
    try:
        yield
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror})") from None


def weights_in(file: Path) -> tuple[WeightsOf, ...]:
    """Which models a `.pt` file of COSMOS holds by name; none for a file that holds one model."""
    if file.suffix == ".safetensors" or not file.is_file():
        return ()
    content = read_torch_file(file)
    named: tuple[WeightsOf, ...] = ("student", "teacher")
    return tuple(name for name in named if isinstance(content, Mapping) and isinstance(content.get(name), Mapping))


def _read(file: Path, weights: WeightsOf) -> tuple[Mapping[str, Tensor], ModelConfig | None]:
    """Weights by name, and their architecture where the file says it."""
    if file.name == MANIFEST:
        stored = StoredTensors(file.parent, weights)
        return dict(stored), _model_in(stored.metadata, file.parent)
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file, weights)


def _read_safetensors(file: Path) -> tuple[Mapping[str, Tensor], ModelConfig | None]:
    with reading(file):  # safetensors says of a file that may not be read that there is none
        file.open("rb").close()
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or no safetensors file ({error})") from None
    if metadata.get("format") != FORMAT:
        return tensors, None
    if "slices" in metadata:
        raise UserError(f"{file} is one of several parts of a checkpoint: give the folder that holds them")
    return tensors, _model_in(metadata, file)


def _model_in(metadata: Mapping[str, str], path: Path) -> ModelConfig:
    """The architecture that a file's metadata describe."""
    try:
        described = json.loads(metadata["model"])
    except (KeyError, ValueError, RecursionError):
        raise UserError(f"{path} does not say what model its weights are of: it is damaged") from None
    return _described(described, path)


def _described(described: Any, path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_openclip(described)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_torch(file: Path, weights: WeightsOf) -> tuple[Mapping[str, Tensor], ModelConfig | None]:
    content = read_torch_file(file)
    state_dict = _select(content, weights, file)  # refuses what is no dict
    return state_dict, _model_of_export(content, file)


def _model_of_export(content: Mapping[Any, Any], file: Path) -> ModelConfig | None:
    """The architecture in a file of `export --to original`; other programs use its key otherwise."""
    described = content.get("model")
    if not (isinstance(described, Mapping) and "crossmodal" in described):
        return None
    towers = [value for value in described.values() if isinstance(value, Mapping)]
    numbers = [value for value in described.values() if not isinstance(value, Mapping)]
    numbers += [value for tower in towers for value in tower.values()]
    names = [name for named in (described, *towers) for name in named]
    # Containers further inside may hold each other so often that no message could show them.
    if not all(type(name) is str for name in names) or not all(type(value) in (int, bool) for value in numbers):
        raise UserError(f"{file} does not say what model its weights are of: it is damaged")
    return _described(described, file)


def _select(content: Any, weights: WeightsOf, file: Path) -> Mapping[str, Tensor]:
    """The state dict inside a checkpoint: COSMOS keeps `student` and `teacher`, OpenCLIP `state_dict`."""
    if not isinstance(content, Mapping):
        raise UserError(f"{file} holds a {type(content).__name__}, expected a dict of weights")
    for key in (weights, "state_dict"):
        if isinstance(content.get(key), Mapping):
            return _tensors(content[key], file)
    if "student" in content or "teacher" in content:
        raise UserError(f"{file} holds no {weights} weights (keys: {', '.join(map(str, list(content)[:6]))})")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return _tensors(content, file)
    raise UserError(f"{file} holds no weights (keys: {', '.join(map(str, list(content)[:6])) or 'none'})")


def _tensors(named: Mapping[Any, Any], file: Path) -> Mapping[str, Tensor]:
    for name, value in named.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise UserError(f"{file}: {name!r} among the weights is a {type(value).__name__}, expected a tensor")
    return named
