"""Class names, synonyms and prompt templates, and the text features built from them.

Axis legend: C classes, S synonyms (all classes together), T templates, D embed, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cosmos_fast.evaluate.division import ALONE, Division
from cosmos_fast.evaluate.encoder import Encoder
from cosmos_fast.utils.errors import UserError

Tokenize = Callable[[list[str]], Tensor]
TEXT_BATCH = 256


@dataclass(frozen=True)
class ClassSet:
    """Names to choose among. `prompts[c][s]` holds the prompts of wording s of class c, templates already filled in.

    wordings, templates: what the prompts were made of, where that is known.
    """

    name: str
    classes: tuple[str, ...]
    prompts: tuple[tuple[tuple[str, ...], ...], ...]
    wordings: tuple[tuple[str, ...], ...] = ()
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        whole = self.prompts and all(wordings and all(wordings) for wordings in self.prompts)
        if not whole or len(self.prompts) != len(self.classes):
            raise UserError(f"class set '{self.name}': every class needs a wording, and every wording a prompt")


def fill_templates(name: str, wordings: Mapping[str, Sequence[str]], templates: Sequence[str]) -> ClassSet:
    """A ClassSet of class -> wordings, each put into every template where its `{}` stands."""
    if not templates or any("{}" not in template for template in templates):
        raise UserError(f"class set '{name}': every prompt template needs '{{}}' where the name goes")
    prompts = tuple(
        tuple(tuple(template.replace("{}", wording) for template in templates) for wording in synonyms)
        for synonyms in wordings.values()
    )
    parts = tuple(tuple(synonyms) for synonyms in wordings.values())
    return ClassSet(name, tuple(wordings), prompts, parts, tuple(templates))


@torch.no_grad()
def encode_texts(
    model: Encoder, texts: Sequence[str], tokenize: Tokenize, normalize: bool = True, division: Division = ALONE
) -> Tensor:
    """Features [len(texts), D] float32 on the model's device. Equal texts are encoded once."""
    unique = list(dict.fromkeys(texts))
    row = {text: index for index, text in enumerate(unique)}
    # Captions of similar length share a batch: the packed text tower then does no work on padding.
    order = sorted(range(len(unique)), key=lambda index: len(unique[index]))
    device = next(model.parameters()).device
    features: list[Tensor] = []
    with division.together():
        for block in division.own(-(-len(order) // TEXT_BATCH)):
            rows = order[block * TEXT_BATCH : (block + 1) * TEXT_BATCH]
            tokens_BL = tokenize([unique[index] for index in rows]).to(device)
            features.append(model.encode_text(tokens_BL, normalize=normalize).float())
    sorted_SD = division.cat(features)
    place = torch.empty(len(order), dtype=torch.long)
    place[torch.tensor(order)] = torch.arange(len(order))
    return sorted_SD[place[torch.tensor([row[text] for text in texts])].to(device)]


def ensemble(prompt_TD: Tensor) -> Tensor:
    """Normalise each prompt's feature, take the mean, normalise again: [T, D] -> [D]."""
    return functional.normalize(functional.normalize(prompt_TD.float(), dim=-1).mean(dim=0), dim=-1)


def class_features(model: Encoder, classes: ClassSet, tokenize: Tokenize, division: Division = ALONE) -> Tensor:
    """One feature a class, over all its wordings and templates: float32 [C, D], normalised (classification)."""
    groups = [[prompt for wording in wordings for prompt in wording] for wordings in classes.prompts]
    return _encode_groups(model, groups, tokenize, division)


def synonym_features(
    model: Encoder, classes: ClassSet, tokenize: Tokenize, division: Division = ALONE
) -> tuple[Tensor, Tensor]:
    """One feature a wording: float32 [S, D] normalised, and int64 [S], the class of each (segmentation)."""
    features_SD = _encode_groups(
        model, [list(wording) for row in classes.prompts for wording in row], tokenize, division
    )
    owner = [index for index, row in enumerate(classes.prompts) for _ in row]
    return features_SD, torch.tensor(owner, device=features_SD.device)


def _encode_groups(model: Encoder, groups: list[list[str]], tokenize: Tokenize, division: Division) -> Tensor:
    features = encode_texts(model, [prompt for group in groups for prompt in group], tokenize, division=division)
    return torch.stack([ensemble(part) for part in features.split([len(group) for group in groups])])
