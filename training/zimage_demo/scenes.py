"""Scenes of flat shapes: sampling, captions in varied wording, and rendering from signed distances.

Coordinates are fractions of the picture's side, x to the right and y down. A scene holds one to three objects that do
not overlap, on a plain, striped or gradient background. What the caption leaves open (a size, a background, the order
of two objects) is drawn at random.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

SIZE = 256  # pixels, both sides

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "orange": (245, 140, 30),
    "purple": (135, 60, 180),
    "pink": (245, 150, 190),
    "cyan": (60, 205, 220),
    "brown": (130, 80, 45),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "gray": (130, 130, 130),
    "dark red": (120, 15, 25),
    "dark green": (15, 80, 35),
    "dark blue": (20, 30, 100),
    "light blue": (160, 200, 255),
    "light green": (150, 225, 140),
    "light gray": (200, 200, 200),
    "dark gray": (65, 65, 65),
}
COLOUR_NAMES = tuple(COLOURS)
BASE_COLOURS = COLOUR_NAMES[:12]
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond", "moon")

# Other words a person may use; the first has most of the weight.
COLOUR_WORDS = {
    "gray": ("gray", "grey"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise", "aqua"),
    "dark blue": ("dark blue", "navy blue", "navy", "deep blue"),
    "light blue": ("light blue", "sky blue", "pale blue"),
    "dark gray": ("dark gray", "dark grey"),
    "light gray": ("light gray", "light grey"),
    "light green": ("light green", "pale green"),
    "dark red": ("dark red", "deep red"),
    "dark green": ("dark green", "deep green"),
}
SHAPE_WORDS = {
    "circle": ("circle", "disc", "dot"),
    "ring": ("ring", "donut"),
    "cross": ("cross", "plus sign", "plus"),
    "diamond": ("diamond", "rhombus"),
    "moon": ("moon", "crescent moon", "crescent"),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
# A background nobody asked for stays neutral, so that "a red circle" is a clean picture.
DEFAULT_BACKGROUNDS = {"white": 0.4, "light gray": 0.15, "black": 0.15, "light blue": 0.15, "dark blue": 0.15}
STRIPE_PERIOD = 0.25  # of the side; two stripes
RELATIONS = {
    "left": (1, 0),
    "right": (-1, 0),
    "above": (0, 1),
    "below": (0, -1),
}  # direction from the first to the second


@dataclass
class Thing:
    """One object: centre and reach as fractions of the side; `size` and `place` where the caption must say them."""

    colour: str
    shape: str
    x: float = 0.5
    y: float = 0.5
    r: float = 0.2
    size: str | None = None
    place: str | None = None


@dataclass
class Background:
    """`kind` is plain, stripes or gradient; `direction` is horizontal, vertical or diagonal (the stripes' own run, and
    for a gradient the way along which the colour changes). `said` is False where the caption leaves it open."""

    kind: str
    colours: tuple[str, ...]
    direction: str = "vertical"
    said: bool = True
    direction_said: bool = False


@dataclass
class Scene:
    """`relation` reads from the first object to the second: left, right, above, below, beside, row, column, or None."""

    things: list[Thing]
    background: Background
    relation: str | None = None
    identical: bool = field(default=False)

    def as_dict(self) -> dict:
        return asdict(self)


# ---------------------------------------------------------------------------------------------------- held-out split


def pair_held_out(colour: str, shape: str) -> bool:
    """True for the ninth of the (colour, shape) pairs that training never shows."""
    return zlib.crc32(f"hold {colour} {shape}".encode()) % 9 == 0


def relation_held_out(first: str, relation: str, second: str) -> bool:
    """True for the tenth of the (shape, relation, shape) combinations that training never shows, in either order."""
    if relation in ("right", "below"):
        first, second, relation = second, first, {"right": "left", "below": "above"}[relation]
    return zlib.crc32(f"relation {first} {relation} {second}".encode()) % 10 == 0


def is_held_out(scene: Scene) -> bool:
    """True if anything in the scene belongs to the held-out part."""
    things = scene.things
    if any(pair_held_out(t.colour, t.shape) for t in things):
        return True
    for i, a in enumerate(things):
        for b in things[i + 1 :]:
            dx, dy = b.x - a.x, b.y - a.y
            relation = ("left" if dx > 0 else "right") if abs(dx) > abs(dy) else ("above" if dy > 0 else "below")
            if not scene.identical and relation_held_out(a.shape, relation, b.shape):
                return True
    return False


# ---------------------------------------------------------------------------------------------------------- sampling


def distance(a: str, b: str) -> float:
    """Euclidean distance of two named colours, in 0..442."""
    return math.dist(COLOURS[a], COLOURS[b])


def distance_to_mix(colour: str, mix: tuple[str, str]) -> float:
    """Smallest distance of a named colour to the blends of two others."""
    a, b = (np.array(COLOURS[c], float) for c in mix)
    p = np.array(COLOURS[colour], float)
    t = np.clip(np.dot(p - a, b - a) / max(np.dot(b - a, b - a), 1e-9), 0, 1)
    return float(np.linalg.norm(p - (a + t * (b - a))))


CONTRAST = {
    c: {
        "plain": [b for b in COLOUR_NAMES if distance(c, b) >= 75],
        "mix": {(a, b) for a in COLOUR_NAMES for b in COLOUR_NAMES if distance_to_mix(c, (a, b)) >= 75},
    }
    for c in COLOUR_NAMES
}


def object_colour(rng: random.Random) -> str:
    return rng.choice(BASE_COLOURS if rng.random() < 0.85 else COLOUR_NAMES[12:])


def sample_background(rng: random.Random, colours: list[str]) -> Background:
    """A background on which all of `colours` stand out."""
    while True:
        roll = rng.random()
        if roll < 0.18:
            names = list(DEFAULT_BACKGROUNDS)
            found = Background("plain", (rng.choices(names, list(DEFAULT_BACKGROUNDS.values()))[0],), said=False)
        elif roll < 0.64:
            found = Background("plain", (rng.choice(COLOUR_NAMES),))
        else:
            a, b = rng.sample(COLOUR_NAMES, 2)
            if distance(a, b) < 75:
                continue
            if roll < 0.82:
                way = rng.choice(("horizontal", "vertical", "diagonal"))
                found = Background("stripes", (a, b), way, direction_said=rng.random() < 0.5)
            else:
                said = rng.random() < 0.5
                way = rng.choice(("horizontal", "vertical")) if said else "vertical"
                found = Background("gradient", (a, b), way, direction_said=said)
        if found.kind == "plain":
            ok = all(found.colours[0] in CONTRAST[c]["plain"] for c in colours)
        else:
            ok = all(found.colours in CONTRAST[c]["mix"] for c in colours)
        if ok:
            return found


def sample_scene(rng: random.Random, structure: str | None = None) -> Scene:
    """Draw one scene; `structure` is single, pair, free pair, corners, triple, same, or None for the training mix."""
    kinds = ("single", "pair", "free pair", "corners", "triple", "same")
    structure = structure or rng.choices(kinds, (0.25, 0.47, 0.08, 0.05, 0.12, 0.03))[0]
    count = {"single": 1, "triple": 3}.get(structure, 2)
    if structure == "same":
        count = rng.choice((2, 3))
        thing = Thing(object_colour(rng), rng.choice(SHAPES))
        things = [Thing(thing.colour, thing.shape) for _ in range(count)]
    else:
        while True:
            things = [Thing(object_colour(rng), rng.choice(SHAPES)) for _ in range(count)]
            if len({(t.colour, t.shape) for t in things}) == count:
                break
    scene = Scene(things, sample_background(rng, [t.colour for t in things]), identical=structure == "same")
    if structure == "single":
        place_single(rng, things[0])
    elif structure == "corners":
        place_corners(rng, scene)
    elif count == 2:
        place_pair(rng, scene, free=structure != "pair")
    else:
        place_triple(rng, scene, free=structure == "same")
    return scene


def reach(rng: random.Random, thing: Thing, small: tuple, usual: tuple, large: tuple) -> None:
    """Give the object a size word (or none) and a reach from that word's range."""
    roll = rng.random()
    thing.size = "small" if roll < 0.15 else "large" if roll < 0.3 else None
    thing.r = rng.uniform(*{"small": small, "large": large, None: usual}[thing.size])


PLACES = {
    "top left": (0.26, 0.26),
    "top": (0.5, 0.26),
    "top right": (0.74, 0.26),
    "left": (0.26, 0.5),
    "center": (0.5, 0.5),
    "right": (0.74, 0.5),
    "bottom left": (0.26, 0.74),
    "bottom": (0.5, 0.74),
    "bottom right": (0.74, 0.74),
}


def place_single(rng: random.Random, thing: Thing) -> None:
    if rng.random() < 0.55:
        reach(rng, thing, (0.12, 0.15), (0.22, 0.28), (0.34, 0.39))
        thing.x, thing.y = (0.5 + rng.uniform(-0.05, 0.05) for _ in range(2))
    else:
        put(rng, thing, rng.choice(list(PLACES)))
        reach(rng, thing, (0.10, 0.12), (0.15, 0.18), (0.195, 0.205))


def put(rng: random.Random, thing: Thing, place: str) -> None:
    thing.place = place
    thing.x, thing.y = (v + rng.uniform(-0.02, 0.02) for v in PLACES[place])


def place_corners(rng: random.Random, scene: Scene) -> None:
    corners = ("top left", "top right", "bottom left", "bottom right")
    for thing, place in zip(scene.things, rng.sample(corners, 2), strict=True):
        put(rng, thing, place)
        reach(rng, thing, (0.10, 0.12), (0.15, 0.18), (0.19, 0.20))


def place_pair(rng: random.Random, scene: Scene, free: bool) -> None:
    relation = rng.choice(tuple(RELATIONS))
    dx, dy = RELATIONS[relation]
    middle = rng.uniform(-0.07, 0.07)
    for thing, side in zip(scene.things, (-1, 1), strict=True):
        along = 0.5 + side * (0.24 + rng.uniform(-0.025, 0.025))
        across = 0.5 + middle + rng.uniform(-0.03, 0.03)
        if dx:
            thing.x, thing.y = (along if dx > 0 else 1 - along), across
        else:
            thing.x, thing.y = across, (along if dy > 0 else 1 - along)
        reach(rng, thing, (0.10, 0.12), (0.15, 0.175), (0.195, 0.205))
    if scene.identical:
        for thing in scene.things:
            thing.size, thing.r = None, rng.uniform(0.15, 0.17)
    if not free:
        scene.relation = relation
    elif dx and not scene.identical and rng.random() < 0.5:
        scene.relation = "beside"


def place_triple(rng: random.Random, scene: Scene, free: bool) -> None:
    layout = rng.choice(("row", "column") if rng.random() < 0.7 else ("pyramid",))
    r = rng.uniform(0.115, 0.135)
    middle = 0.5 + rng.uniform(-0.06, 0.06)
    for i, thing in enumerate(scene.things):
        along, across = 0.2 + 0.3 * i + rng.uniform(-0.01, 0.01), middle + rng.uniform(-0.02, 0.02)
        if layout == "pyramid":
            thing.x, thing.y = ((0.5, 0.27), (0.26, 0.7), (0.74, 0.7))[i]
        else:
            thing.x, thing.y = (along, across) if layout == "row" else (across, along)
        thing.r = r
    if not free and layout != "pyramid" and rng.random() < 0.7:
        scene.relation = layout


def sample_training_scene(rng: random.Random, structure: str | None = None) -> Scene:
    """A scene without any held-out pair or relation."""
    while True:
        scene = sample_scene(rng, structure)
        if not is_held_out(scene):
            return scene


# ---------------------------------------------------------------------------------------------------------- captions


def word(rng: random.Random, words: dict[str, tuple[str, ...]], key: str) -> str:
    options = words.get(key, (key,))
    return options[0] if len(options) == 1 or rng.random() < 0.85 else rng.choice(options[1:])


def colour_word(rng: random.Random, colour: str) -> str:
    return word(rng, COLOUR_WORDS, colour)


def noun(rng: random.Random, thing: Thing, plural: bool = False) -> str:
    """`large red circle`, without an article."""
    shape = word(rng, SHAPE_WORDS, thing.shape)
    if plural:
        shape += "es" if shape.endswith("ss") or shape.endswith("us") else "s"
    size = word(rng, SIZE_WORDS, thing.size) + " " if thing.size else ""
    return f"{size}{colour_word(rng, thing.colour)} {shape}"


def article(rng: random.Random, text: str) -> str:
    """`text` with an article before it, now and then with none or another one."""
    roll = rng.random()
    if roll < 0.06:
        return text
    if roll < 0.09:
        return "the " + text
    if roll < 0.11:
        return "one " + text
    vowel = text[0] in "aeiou" and roll < 0.98
    return ("an " if vowel else "a ") + text


def phrase(rng: random.Random, thing: Thing) -> str:
    return article(rng, noun(rng, thing))


def place_phrase(rng: random.Random, place: str) -> str:
    if place == "center":
        return rng.choice(("in the center", "in the middle", "at the center", "in the centre"))
    if place in ("top", "bottom"):
        return rng.choice((f"at the {place}", f"near the {place}", f"on the {place}", f"at the {place} of the picture"))
    if place in ("left", "right"):
        return rng.choice((f"on the {place}", f"on the {place} side", f"at the {place}", f"to the {place}"))
    first = "upper" if place.startswith("top") else "lower"
    other = f"{first} {place.split()[1]}"
    place = place if rng.random() < 0.8 else other
    return rng.choice((f"in the {place} corner", f"in the {place}", f"at the {place}", f"in the {place} corner"))


BEFORE = {
    "left": ("left of", "to the left of", "on the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right of", "on the right side of"),
    "above": ("above", "over", "on top of", "directly above"),
    "below": ("below", "under", "beneath", "underneath"),
}
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
ENDS = {
    "left": ("on the left", "on the right"),
    "right": ("on the right", "on the left"),
    "above": ("at the top", "at the bottom"),
    "below": ("at the bottom", "at the top"),
}


def relation_phrase(rng: random.Random, scene: Scene) -> str:
    first, second, relation = *scene.things, scene.relation
    if rng.random() < 0.4:
        first, second, relation = second, first, INVERSE[relation]
    a, b = phrase(rng, first), phrase(rng, second)
    link = rng.choice(BEFORE[relation]) if rng.random() < 0.5 else BEFORE[relation][0]
    here, there = ENDS[relation]
    roll = rng.random()
    if roll < 0.72:
        return f"{a} {link} {b}"
    if roll < 0.80:
        return f"{a} is {link} {b}"
    if roll < 0.92:
        return f"{a} {here}{rng.choice((' and', ',', ' and', ', and'))} {b} {there}"
    if roll < 0.96:
        return f"{here} {a}, {there} {b}"
    return f"{link} {b} is {a}"


def objects_phrase(rng: random.Random, scene: Scene) -> str:
    things = scene.things
    if scene.identical:
        return f"{('two', 'three')[len(things) - 2]} {noun(rng, things[0], plural=True)}"
    if len(things) == 1:
        text = phrase(rng, things[0])
        if things[0].place:
            text += rng.choice((" ", " ", " ", ", ")) + place_phrase(rng, things[0].place)
        return text
    if scene.relation in RELATIONS:
        return relation_phrase(rng, scene)
    named = [phrase(rng, t) + (" " + place_phrase(rng, t.place) if t.place else "") for t in things]
    if scene.relation in ("row", "column"):
        row = scene.relation == "row"
        if rng.random() < 0.3:
            named.reverse()
            order = "from right to left" if row else "from bottom to top"
        else:
            order = "from left to right" if row else "from top to bottom"
        listed = listing(rng, named)
        return rng.choice((f"{order}: {listed}", f"{order} {listed}", f"{listed}, {order}", f"{listed} {order}"))
    if not things[0].place:
        rng.shuffle(named)
    if scene.relation == "beside":
        return f"{named[0]} {rng.choice(('next to', 'beside', 'by', 'side by side with'))} {named[1]}"
    listed = listing(rng, named)
    if not things[0].place and rng.random() < 0.2:
        count = ("two", "three")[len(things) - 2]
        return f"{count} {rng.choice(('objects', 'shapes'))}{rng.choice((':', ','))} {listed}"
    return listed


def listing(rng: random.Random, named: list[str]) -> str:
    last = rng.choice((" and ", " and ", ", ", ", and ") if len(named) > 2 else (" and ", " and ", ", ", " with "))
    return ", ".join(named[:-1]) + last + named[-1]


def background_phrase(rng: random.Random, ground: Background) -> tuple[str, bool]:
    """The words for a background, and whether they are a noun phrase that needs `on` before it."""
    colours = [colour_word(rng, c) for c in ground.colours]
    if ground.kind == "plain":
        plain = rng.choice(("", "", "", "", "plain ", "solid "))
        return article_a(f"{plain}{colours[0]} background"), True
    if ground.kind == "stripes":
        a, b = colours if rng.random() < 0.8 else colours[::-1]
        way = ground.direction + " " if ground.direction_said else ""
        return rng.choice(
            (
                (article_a(f"{a} and {b} striped background"), True)
                if not way
                else (article_a(f"background of {way}{a} and {b} stripes"), True),
                (f"a background with {way}{a} and {b} stripes", True),
                (f"a striped background with {way}{a} and {b} stripes", True),
                (f"{way}{a} and {b} stripes", True),
                (f"{way}stripes of {a} and {b}", True),
            )
        )
    a, b = colours
    if not ground.direction_said:
        return rng.choice(
            (
                (f"a gradient background from {a} to {b}", True),
                (f"a background fading from {a} to {b}", True),
                (article_a(f"{a} to {b} gradient"), True),
                (article_a(f"{a} to {b} gradient background"), True),
                (f"a gradient from {a} to {b}", True),
            )
        )
    vertical = ground.direction == "vertical"
    top, bottom = ("at the top", "at the bottom") if vertical else ("on the left", "on the right")
    return rng.choice(
        (
            (f"a gradient from {a} {top} to {b} {bottom}", True),
            (f"a background fading from {a} {top} to {b} {bottom}", True),
            (f"a {ground.direction} gradient from {a} to {b}", True),
            (f"a {ground.direction} {a} to {b} gradient", True),
        )
    )


def article_a(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


NO_PREFIX = ("from ", "at ", *(f"{link} " for links in BEFORE.values() for link in links), "on the ")
PREFIXES = (
    "a picture of", "an image of", "a drawing of", "draw", "show", "show me", "an illustration of", "a painting of",
    "generate", "make", "there is", "please draw", "a simple picture of", "create", "picture of", "image of",
)  # fmt: skip


def caption(rng: random.Random, scene: Scene) -> str:
    """One wording of the scene; everything that was fixed by a word in the scene is said, the rest is not."""
    text = objects_phrase(rng, scene)
    if rng.random() < 0.25 and not text.startswith(NO_PREFIX):
        text = f"{rng.choice(PREFIXES)} {text}"
    ground = scene.background
    if ground.said:
        words, _ = background_phrase(rng, ground)
        roll = rng.random()
        if roll < 0.76:
            text = (
                f"{text}{rng.choice((' ', ' ', ' ', ', '))}{rng.choice(('on', 'on', 'on', 'with', 'against'))} {words}"
            )
        elif roll < 0.86:
            words = words[2:] if words.startswith("a ") else words[3:] if words.startswith("an ") else words
            text = f"{text}, {words}"
        elif roll < 0.92:
            text = f"on {words}, {text}" if rng.random() < 0.5 else f"on {words} {text}"
        elif roll < 0.96 and ground.kind == "plain":
            colour = colour_word(rng, ground.colours[0])
            text += rng.choice((f" on {colour}", f", the background is {colour}", f". The background is {colour}"))
        else:
            text = f"{words} with {text}"
    roll = rng.random()
    if roll < 0.2:
        text = text[0].upper() + text[1:]
    elif roll < 0.23:
        text = text.title()
    elif roll < 0.25:
        text = text.upper()
    return text + ("." if rng.random() < 0.2 else "")


# --------------------------------------------------------------------------------------------------------- rendering

SCENE_WIDTH = 8 + 3 * 7  # numbers of one packed scene
GROUND_KINDS = ("plain", "stripes", "gradient")
DIRECTIONS = ("horizontal", "vertical", "diagonal")


def pack(scene: Scene) -> np.ndarray:
    """[29] float32: kind, direction, two colours (0..1); then three slots of shape (-1: empty), colour, x, y, r."""
    row = np.zeros(SCENE_WIDTH, np.float32)
    ground = scene.background
    row[0], row[1] = GROUND_KINDS.index(ground.kind), DIRECTIONS.index(ground.direction)
    row[2:5], row[5:8] = (np.array(COLOURS[c]) / 255 for c in (ground.colours[0], ground.colours[-1]))
    for i in range(3):
        slot = row[8 + 7 * i : 15 + 7 * i]
        slot[0] = -1
        if i < len(scene.things):
            thing = scene.things[i]
            slot[0] = SHAPES.index(thing.shape)
            slot[1:4] = np.array(COLOURS[thing.colour]) / 255
            slot[4:] = thing.x, thing.y, thing.r
    return row


def shape_distances(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """Signed distances (negative inside) of all SHAPES at points given in units of the object's reach, y down."""
    length = torch.sqrt(x * x + y * y + 1e-12)
    ax, ay = x.abs(), y.abs()
    ty = y - 0.2
    triangle = torch.maximum(ty, 0.8660254 * ax - 0.5 * ty) - 0.6
    # One fifth of the star, folded at its axis: a half-plane through the outer and the inner corner.
    sector = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    u, v = length * torch.cos(angle), length * torch.sin(angle).abs()
    inner = (0.46 * math.cos(sector / 2), 0.46 * math.sin(sector / 2))
    edge = (inner[0] - 1.12, inner[1])
    star = ((u - 1.12) * edge[1] - v * edge[0]) / math.hypot(*edge)
    hx, hy = ax / 1.75, 0.58 - y / 1.75
    diagonal = 0.5 * torch.clamp(hx + hy, min=0)
    lobe = torch.sqrt((hx - 0.25) ** 2 + (hy - 0.75) ** 2 + 1e-12) - math.sqrt(2) / 4
    sides = torch.sqrt(
        torch.minimum(hx**2 + (hy - 1) ** 2, (hx - diagonal) ** 2 + (hy - diagonal) ** 2) + 1e-12
    ) * torch.sign(hx - hy)
    heart = 1.75 * torch.where(hx + hy > 1, lobe, sides)
    cross = torch.minimum(torch.maximum(ax - 0.95, ay - 0.32), torch.maximum(ax - 0.32, ay - 0.95))
    mx = x - 0.2
    bite = 0.8 - torch.sqrt((mx - 0.42) ** 2 + y * y + 1e-12)
    moon = torch.maximum(torch.sqrt(mx * mx + y * y + 1e-12) - 0.95, bite)
    return [
        length - 0.9,
        torch.maximum(ax, ay) - 0.8,
        triangle,
        star,
        heart,
        (length - 0.72).abs() - 0.23,
        cross,
        (ax / 0.8 + ay / 1.1 - 1) * 0.647,
        moon,
    ]


def render(rows: torch.Tensor, size: int = SIZE, window: torch.Tensor | None = None) -> torch.Tensor:
    """Pictures [n, 3, size, size] in -1..1 of packed scenes [n, 29], edges covered to a fraction of a pixel.

    `window` [n, 3] (x, y, side; fractions of the whole picture) draws only that part of each scene.
    """
    n = rows.shape[0]
    centres = (torch.arange(size, device=rows.device, dtype=torch.float32) + 0.5) / size
    if window is None:
        x, y, side = centres.view(1, 1, -1), centres.view(1, -1, 1), 1.0
        x, y = x.expand(n, size, size), y.expand(n, size, size)
    else:
        side = window[:, 2].view(n, 1, 1)
        x = (window[:, 0].view(n, 1, 1) + side * centres.view(1, 1, -1)).expand(n, size, size)
        y = (window[:, 1].view(n, 1, 1) + side * centres.view(1, -1, 1)).expand(n, size, size)
    pixels = size / side  # per unit of the picture

    def number(i: int) -> torch.Tensor:
        return rows[:, i].view(n, 1, 1)

    def colour(i: int) -> torch.Tensor:
        return rows[:, i : i + 3].view(n, 3, 1, 1)

    kind, way = number(0), number(1)
    along = torch.where(way == 0, y, torch.where(way == 1, x, x + y)) / STRIPE_PERIOD
    slope = torch.where(way == 2, 1 / math.sqrt(2), 1.0) * STRIPE_PERIOD
    stripe = ((torch.frac(along + 0.25) - 0.5).abs() - 0.25) * slope
    first = torch.clamp(0.5 - stripe * pixels, 0, 1)
    ramp = 1 - torch.where(way == 0, x, y)
    weight = torch.where(kind == 0, 1.0, torch.where(kind == 1, first, ramp)).unsqueeze(1)
    picture = colour(2) * weight + colour(5) * (1 - weight)
    for slot in range(3):
        at = 8 + 7 * slot
        r = number(at + 6).clamp(min=1e-3)
        shape = number(at)
        d = torch.full_like(x, 10.0)
        for index, found in enumerate(shape_distances((x - number(at + 4)) / r, (y - number(at + 5)) / r)):
            d = torch.where(shape == index, found, d)
        cover = torch.clamp(0.5 - d * r * pixels, 0, 1).unsqueeze(1)
        picture = picture + (colour(at + 1) - picture) * cover
    return picture * 2 - 1
