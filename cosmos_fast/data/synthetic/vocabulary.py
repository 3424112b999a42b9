"""The words of the synthetic world: names used in the records, and the synonyms captions may put in their place."""

from __future__ import annotations

# name -> RGB. Hues are spaced by >= 40 degrees so that the hue jitter of training (0.1 turn) seldom swaps two of them.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "yellow": (250, 209, 30),
    "green": (44, 168, 66),
    "cyan": (50, 205, 215),
    "blue": (40, 84, 214),
    "purple": (150, 52, 190),
    "white": (246, 246, 242),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent")
# name -> diameter as a share of the picture's short side (lowest, highest)
SIZES: dict[str, tuple[float, float]] = {"small": (0.20, 0.23), "medium": (0.27, 0.31), "large": (0.36, 0.42)}
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("plain", "gradient", "grass", "water", "bricks", "night sky", "sand", "wood")
# name -> grid cell (column, row)
PLACES: dict[str, tuple[int, int]] = {
    "upper left": (0, 0),
    "top": (1, 0),
    "upper right": (2, 0),
    "left": (0, 1),
    "middle": (1, 1),
    "right": (2, 1),
    "lower left": (0, 2),
    "bottom": (1, 2),
    "lower right": (2, 2),
}
# Colours that would vanish on a background; such pairs are never drawn.
CLASHES: dict[str, frozenset[str]] = {
    "grass": frozenset({"green"}),
    "water": frozenset({"blue", "cyan"}),
    "bricks": frozenset({"red"}),
    "night sky": frozenset({"black", "blue"}),
    "sand": frozenset({"yellow"}),
}

# The first synonym is the name itself.
SHAPE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc", "round disc"),
    "square": ("square", "box", "square box"),
    "triangle": ("triangle", "three-sided triangle"),
    "star": ("star", "five-pointed star"),
    "heart": ("heart", "heart shape", "love heart"),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop", "round ring"),
    "crescent": ("crescent", "half moon", "crescent moon"),
}
COLOUR_SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "bright red"),
    "yellow": ("yellow", "golden", "lemon yellow"),
    "green": ("green", "bright green", "leafy green"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "royal blue", "deep blue"),
    "purple": ("purple", "violet"),
    "white": ("white", "snow white"),
    "black": ("black", "jet black"),
}
SIZE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}
TEXTURE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "plain": ("plain", "solid", "uniform"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "polka-dotted", "spotted"),
    "checkered": ("checkered", "chequered", "checked"),
}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "upper left": ("in the upper left", "in the top left corner"),
    "top": ("at the top", "near the upper edge"),
    "upper right": ("in the upper right", "in the top right corner"),
    "left": ("on the left", "at the left side"),
    "middle": ("in the middle", "in the center"),
    "right": ("on the right", "at the right side"),
    "lower left": ("in the lower left", "in the bottom left corner"),
    "bottom": ("at the bottom", "near the lower edge"),
    "lower right": ("in the lower right", "in the bottom right corner"),
}
# No colour words here: a caption's colours are the colours of its objects.
BACKGROUND_PHRASES: dict[str, tuple[str, ...]] = {
    "plain": ("a plain background", "an even, empty backdrop"),
    "gradient": ("a smooth gradient", "a softly shaded backdrop"),
    "grass": ("a lawn of grass", "a grassy meadow"),
    "water": ("rippling water", "water with gentle waves"),
    "bricks": ("a brick wall", "a wall of bricks"),
    "night sky": ("a starry night sky", "a night sky full of stars"),
    "sand": ("a stretch of sand", "a sandy beach"),
    "wood": ("wooden boards", "a surface of wooden planks"),
}

# Zero-shot prompts, like the captions without a final period: {} takes a noun such as "star" or "red star".
TEMPLATES = (
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "a {} in a scene",
    "there is a {} in the picture",
    "a scene with a {}",
    "a small {}",
    "a large {}",
)
# Zero-shot prompts for colours: {} takes an adjective such as "red".
COLOUR_TEMPLATES = ("a {} object", "a photo of a {} object", "a {} shape in a scene", "something {} in the picture")
# Zero-shot prompts for backgrounds: {} takes one of the phrases such as "a brick wall".
BACKGROUND_TEMPLATES = ("shapes on {}", "objects in front of {}", "a scene with {} in the background")
