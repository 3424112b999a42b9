"""Colours of the report, once: the plots (matplotlib) and the page (CSS variables) take them from here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """One palette. Series colours keep apart for colour-blind readers and on their own background."""

    name: str
    page: str
    card: str
    ink: str
    muted: str
    line: str
    accent: str
    good: str
    bad: str
    teacher: str
    student: str
    clip: str
    chance: str

    def series(self, entity: str) -> str:
        return {"teacher": self.teacher, "student": self.student, "clip": self.clip, "chance": self.chance}[entity]


LIGHT = Theme(
    name="light",
    page="#f6f7fb",
    card="#ffffff",
    ink="#1c2033",
    muted="#626a80",
    line="#e2e5ee",
    accent="#4a4fd8",
    good="#15803d",
    bad="#c2314a",
    teacher="#4a4fd8",
    student="#1596b8",
    clip="#dd7318",
    chance="#8b91a3",
)
DARK = Theme(
    name="dark",
    page="#11131c",
    card="#1a1d2a",
    ink="#e7e9f3",
    muted="#9aa2b8",
    line="#2c3145",
    accent="#979cff",
    good="#4ade80",
    bad="#fb7185",
    teacher="#979cff",
    student="#4cc9e8",
    clip="#ffa64d",
    chance="#7f879c",
)
THEMES = (LIGHT, DARK)

# Segmentation overlays: background first (drawn transparent), then one colour a class, used in turn.
CLASS_COLOURS = (
    "#e6454f",
    "#f2a81d",
    "#35b26b",
    "#2f86e0",
    "#9a55d8",
    "#12b5b0",
    "#e05aa8",
    "#8a6b3d",
    "#a3b81f",
    "#5b6478",
)
