"""Class names, synonyms and prompt templates, and the text features built from them.

Axis legend: C classes, S synonyms (all classes together), T templates, D embed, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cosmos_fast.utils.errors import UserError

Tokenize = Callable[[list[str]], Tensor]
TEXT_BATCH = 256


@dataclass(frozen=True)
class ClassSet:
    """Names to choose among. `synonyms[c]` holds the wordings of class c (its name first), `templates` have a `{}`."""

    name: str
    classes: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.classes or len(self.synonyms) != len(self.classes) or not all(self.synonyms):
            raise UserError(f"class set '{self.name}': every class needs a name and at least one wording")
        if not self.templates or any("{}" not in template for template in self.templates):
            raise UserError(f"class set '{self.name}': every prompt template needs '{{}}' where the name goes")

    def prompts(self, wording: str) -> list[str]:
        return [template.replace("{}", wording) for template in self.templates]


@torch.no_grad()
def encode_texts(model: nn.Module, texts: Sequence[str], tokenize: Tokenize, normalize: bool = True) -> Tensor:
    """Features [len(texts), D] float32 on the model's device. Equal texts are encoded once."""
    unique = list(dict.fromkeys(texts))
    row = {text: index for index, text in enumerate(unique)}
    # Captions of similar length share a batch: the packed text tower then does no work on padding.
    order = sorted(range(len(unique)), key=lambda index: len(unique[index]))
    device = next(model.parameters()).device
    features: list[Tensor] = []
    for start in range(0, len(order), TEXT_BATCH):
        tokens_BL = tokenize([unique[index] for index in order[start : start + TEXT_BATCH]]).to(device)
        features.append(model.encode_text(tokens_BL, normalize=normalize).float())  # type: ignore[operator]
    sorted_SD = torch.cat(features)
    place = torch.empty(len(order), dtype=torch.long)
    place[torch.tensor(order)] = torch.arange(len(order))
    return sorted_SD[place[torch.tensor([row[text] for text in texts])].to(device)]


def ensemble(prompt_TD: Tensor) -> Tensor:
    """Normalise each prompt's feature, take the mean, normalise again: [T, D] -> [D]."""
    return functional.normalize(functional.normalize(prompt_TD.float(), dim=-1).mean(dim=0), dim=-1)


def class_features(model: nn.Module, classes: ClassSet, tokenize: Tokenize) -> Tensor:
    """One feature a class, over all its wordings and templates: float32 [C, D], normalised (classification)."""
    groups = [[p for wording in synonyms for p in classes.prompts(wording)] for synonyms in classes.synonyms]
    return _encode_groups(model, groups, tokenize)


def synonym_features(model: nn.Module, classes: ClassSet, tokenize: Tokenize) -> tuple[Tensor, Tensor]:
    """One feature a wording: float32 [S, D] normalised, and int64 [S], the class of each (segmentation)."""
    wordings = [(index, wording) for index, synonyms in enumerate(classes.synonyms) for wording in synonyms]
    features_SD = _encode_groups(model, [classes.prompts(wording) for _, wording in wordings], tokenize)
    return features_SD, torch.tensor([index for index, _ in wordings], device=features_SD.device)


def _encode_groups(model: nn.Module, groups: list[list[str]], tokenize: Tokenize) -> Tensor:
    features = encode_texts(model, [prompt for group in groups for prompt in group], tokenize)
    return torch.stack([ensemble(part) for part in features.split([len(group) for group in groups])])
