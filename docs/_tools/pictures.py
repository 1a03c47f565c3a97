"""Draws the pictures of the pages, docs/pictures/*.svg.

    python docs/_tools/pictures.py            # draws them
    python docs/_tools/pictures.py --check    # exits with 1 if one is not what this would draw

They are as narrow as a phone, so that their letters can be read on one, and have a ground of their
own, for dark pages. What they show is computed where it can be: draws and errors with NumPy, losses
from benchmarks/results.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
sys.path.insert(0, str(ROOT / "benchmarks"))

from formats import load  # noqa: E402
from quality_tables import STEPS  # noqa: E402

INK, SOFT, GROUND, LINE = "#1b1f2a", "#5a6072", "#f7f8fb", "#c3c8d6"
# Told apart by those who see no red or no green, too.
EXACT, DARK, PERFORMER, MEMORY = "#6b7280", "#3949ab", "#c2571a", "#0f8a7e"
WIDTH = 420


class Picture:
    """An SVG that is put together from top to bottom."""

    def __init__(self, title: str, height: int) -> None:
        self.title, self.height = title, height
        self.parts: list[str] = []

    def add(self, name: str, text: str = "", **attributes: object) -> None:
        """One element; numbers are rounded, since they say nothing beyond a tenth of a pixel."""
        told = "".join(
            f' {key.replace("_", "-")}="{f"{x:.1f}" if isinstance(x, float) else x}"'
            for key, x in attributes.items()
        )
        self.parts.append(f"<{name}{told}>{text}</{name}>" if text else f"<{name}{told}/>")

    def text(self, x: float, y: float, text: str, size: int = 14, **more: object) -> None:
        """A line of text that begins at x, or is around it with `text_anchor="middle"`."""
        more = {"fill": INK} | more
        self.add("text", text, x=float(x), y=float(y), font_size=size, **more)

    def box(self, x: float, y: float, w: float, h: float, fill: str, **more: object) -> None:
        """A rectangle with round corners."""
        more = {"rx": 3} | more
        self.add("rect", x=float(x), y=float(y), width=float(w), height=float(h), fill=fill, **more)

    def line(
        self, x: float, y: float, to_x: float, to_y: float, color: str, **more: object
    ) -> None:
        """A straight line."""
        ends = {"x1": float(x), "y1": float(y), "x2": float(to_x), "y2": float(to_y)}
        self.add("line", **ends, stroke=color, **more)

    def arrow(self, x: float, y: float, to_x: float, to_y: float, color: str = SOFT) -> None:
        """A straight arrow."""
        step = np.array([to_x - x, to_y - y])
        step = step / np.linalg.norm(step)
        side = np.array([-step[1], step[0]])
        tip, base = np.array([to_x, to_y]), np.array([to_x, to_y]) - 7 * step
        ends = [tip, base + 4 * side, base - 4 * side]
        self.line(x, y, *base, color, stroke_width=1.5)
        self.add("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in ends), fill=color)

    def svg(self) -> str:
        """The whole file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{WIDTH}" height="{self.height}" role="img" '
            'font-family="Helvetica, Arial, sans-serif">'
        )
        ground = (
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8" '
            f'fill="{GROUND}" stroke="{LINE}"/>'
        )
        title = f"<title>{self.title}</title>"
        return "\n".join([head, title, ground, *self.parts, "</svg>"]) + "\n"


def anisotropic(rng, count):
    """Queries or keys that fill one of two directions, as those of trained heads do."""
    turn = np.radians(28)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return (rng.normal(size=(count, 2)) * [1.9, 0.25]) @ rotation


def kernel():
    """Estimates of the kernel against its value, with features drawn alike in all directions."""
    picture = Picture("A kernel and its estimate by features", 300)
    picture.text(16, 28, "The kernel, and what 64 features say of it", font_weight="bold")
    rng = np.random.default_rng(0)
    for place, (scale, name, color) in enumerate(
        [(0.6, "short vectors", DARK), (1.9, "long vectors", PERFORMER)]
    ):
        left, top, size = 46 + 196 * place, 62, 150
        x = rng.normal(size=(2, 260, 4)) * scale
        w = rng.normal(size=(260, 64, 4))
        q, k = x
        exact = np.sum(q * k, -1)

        def log_features(v, w=w):
            return np.einsum("pmd,pd->pm", w, v) - np.sum(v * v, -1, keepdims=True) / 2

        estimate = np.log(np.mean(np.exp(log_features(q) + log_features(k)), -1))
        low, high = -4.0 * scale**1.3, 4.0 * scale**1.3
        picture.box(left, top, size, size, "#ffffff", stroke=LINE, rx=0)
        picture.line(left, top + size, left + size, top, EXACT, stroke_dasharray="4 3")

        def at(value, low=low, high=high, size=size):
            return (value - low) / (high - low) * size

        for a, b in zip(exact, estimate, strict=True):
            if low < a < high and low < b < high:
                spot = {"cx": float(left + at(a)), "cy": float(top + size - at(b))}
                picture.add("circle", **spot, r=2, fill=color, fill_opacity="0.55")
        picture.text(left + size / 2, top - 8, name, 13, fill=color, text_anchor="middle")
        picture.text(left + size / 2, top + size + 20, "log kernel", 12, fill=SOFT,
                     text_anchor="middle")  # fmt: skip
    turned = {"transform": "rotate(-90 32 137)", "fill": SOFT, "text_anchor": "middle"}
    picture.text(32, 137, "log estimate", 12, **turned)
    picture.text(16, 262, "On the dashed line an estimate is exact. The mean is", 12)
    picture.text(16, 280, "right in both; of long vectors most are far too small.", 12)
    return picture


def covariance():
    """Where features look, and where queries and keys are."""
    picture = Picture("Features drawn alike in all directions, and along the data", 312)
    picture.text(16, 28, "Where features look, and where data are", font_weight="bold")
    rng = np.random.default_rng(1)
    data = anisotropic(rng, 90)
    draws = rng.normal(size=(18, 2))
    geometry = np.linalg.cholesky(data.T @ data / len(data)).T
    for place, (name, sigma, w, color) in enumerate(
        [
            ("Performer: N(0, I)", np.eye(2), draws, PERFORMER),
            ("DARKFormer: N(0, Σ)", geometry.T @ geometry, draws @ geometry, DARK),
        ]
    ):
        x, y, unit = 110 + 200 * place, 146, 22.0
        picture.box(x - 92, y - 92, 184, 184, "#ffffff", stroke=LINE, rx=0)
        for point in data:
            if np.max(np.abs(point)) * unit < 88:
                spot = {"cx": float(x + unit * point[0]), "cy": float(y - unit * point[1])}
                picture.add("circle", **spot, r=2, fill=EXACT, fill_opacity="0.6")
        for direction in w:
            length = np.linalg.norm(direction)
            end = direction * min(1.0, 84 / unit / length) * unit
            ray = {"stroke_width": 1.6, "stroke_opacity": "0.8"}
            picture.line(x, y, x + end[0], y - end[1], color, **ray)
        values, vectors = np.linalg.eigh(sigma)
        radii = 1.5 * np.sqrt(values[::-1]) * unit
        angle = -np.degrees(np.arctan2(*vectors[::-1, 1]))
        picture.add("ellipse", cx=x, cy=y, rx=float(min(radii[0], 90.0)), ry=float(radii[1]),
                    fill="none", stroke=color, stroke_width=2,
                    transform=f"rotate({angle:.1f} {x} {y})")  # fmt: skip
        picture.text(x, 256, name, 14, fill=color, font_weight="bold", text_anchor="middle")
    picture.text(16, 280, "Grey: queries and keys. Lines: directions of features.", 12)
    picture.text(16, 298, "Ellipse: their covariance. M is learned, and Σ = MᵀM.", 12)
    return picture


def memory():
    """One query's view of a text, with an exact memory."""
    picture = Picture("What a query meets exactly, and what features stand for", 286)
    picture.text(16, 28, "What one query meets", font_weight="bold")
    kinds = "SSffffkffkfffkfffWWWWWQ"
    colors = {"S": MEMORY, "k": MEMORY, "W": MEMORY, "f": "#d5d9ea", "Q": INK}
    size, left, top = 15.0, 16.0, 92.0
    for place, kind in enumerate(kinds):
        picture.box(left + place * (size + 2), top, size, 26, colors[kind])
    middle = {"text_anchor": "middle"}

    def over(first, last):
        return left + (first + last + 1) / 2 * (size + 2) - 1

    for first, last, name in ((0, 1, "sinks"), (17, 21, "window")):
        label = {"fill": MEMORY, "font_weight": "bold", **middle}
        picture.text(max(over(first, last), 36), 62, name, 14, **label)
        bracket = f"M{over(first, first) - 7:.1f} 84 V74 H{over(last, last) + 7:.1f} V84"
        picture.add("path", d=bracket, fill="none", stroke=MEMORY, stroke_width=1.5)
    picture.text(over(6, 13), 62, "kept keys", 14, fill=MEMORY, font_weight="bold", **middle)
    for place in (6, 9, 13):
        picture.arrow(over(6, 13), 68, over(place, place), 89, MEMORY)
    picture.text(over(22, 22), 82, "q", 14, font_weight="bold", **middle)
    for place, kind in enumerate(kinds):
        if kind == "f":
            picture.line(over(place, place), 120, 180, 160, DARK, stroke_opacity="0.45")
    picture.box(100, 160, 160, 34, DARK)
    picture.text(180, 182, "sums of features", 14, fill="#ffffff", **middle)
    picture.text(16, 224, "Green: met with softmax's own kernel, exp(q·k).", 13, fill=MEMORY)
    picture.text(16, 244, "Blue: all others, far away, in sums of constant size.", 13, fill=DARK)
    picture.text(16, 264, "One normaliser for both; calibration sets their shares.", 13)
    return picture


def state():
    """What a layer carries while it writes: a cache that grows, and a state that does not."""
    picture = Picture("A key/value cache grows with the text; a state does not", 318)
    picture.text(16, 28, "What a layer carries while it writes", font_weight="bold")
    middle = {"text_anchor": "middle"}
    for place, (tokens, label) in enumerate([(4, "100 tokens"), (8, "200"), (20, "500")]):
        x = 96 + 112 * place
        picture.text(x + 40, 56, label, 13, fill=SOFT, **middle)
        for token in range(tokens):
            row, column = divmod(token, 5)
            picture.box(x + column * 16, 70 + row * 16, 14, 14, EXACT)
        picture.box(x, 172, 80, 34, DARK)
        picture.text(x + 40, 193, "sums", 14, fill="#ffffff", **middle)
        for slot in range(5):
            picture.box(x + slot * 16, 210, 14, 14, MEMORY)
        if place:
            picture.arrow(x - 28, 198, x - 6, 198)
    picture.text(16, 96, "softmax", 14, font_weight="bold", fill=EXACT)
    picture.text(16, 114, "keys and", 12, fill=SOFT)
    picture.text(16, 129, "values", 12, fill=SOFT)
    picture.text(16, 188, "dark", 14, font_weight="bold", fill=DARK)
    picture.text(16, 206, "state", 12, fill=SOFT)
    picture.text(16, 252, "sums ← sums + φ(k) vᵀ", 14, fill=DARK, font_weight="bold")
    picture.text(16, 272, "output = φ(q) · sums, beside the keys that are kept exactly", 13)
    picture.text(16, 298, "The cache grows with each token; each query reads it all.", 12,
                 fill=SOFT)  # fmt: skip
    return picture


LEVELS = ("Performer", "`calibrate`", "+ `transfer_attention`, 100 steps", "+ `distil`, 300 steps",
          "exact")  # fmt: skip


def stages():
    """The way from a checkpoint to a dark model, with the losses of one."""
    summary = load("quality")["summary"]
    losses = [summary[STEPS[name]]["text"][0] for name in LEVELS]
    told = (
        ("convert_to_dark", "features in, weights stay (here M = I)", PERFORMER),
        ("calibrate", "fits features to queries and keys, in one pass", DARK),
        ("transfer_attention", "each layer learns its own softmax", DARK),
        ("distil", "the whole learns the exact model's logits", DARK),
        ("the source, exact", "what all of it is measured against", EXACT),
    )
    picture = Picture("From a checkpoint to a dark model", 344)
    picture.text(16, 28, "From a checkpoint to a dark model", font_weight="bold")
    for row, (loss, (name, does, color)) in enumerate(zip(losses, told, strict=True)):
        y = 44 + 54 * row
        picture.text(16, y + 16, name, 14, fill=color, font_weight="bold")
        picture.text(16, y + 32, does, 12, fill=SOFT)
        picture.box(320, y + 4, 84, 28, "#e6e9f2")
        picture.box(320, y + 4, float(84 * loss / losses[0]), 28, color)
        picture.text(328, y + 23, f"{loss:.2f}", 14, fill="#ffffff", font_weight="bold")
        if row < 3:
            picture.arrow(26, y + 36, 26, y + 56)
    picture.text(16, 322, "Loss of held-out text: a small Gemma, m = 64.",
                 12, fill=SOFT)  # fmt: skip
    return picture


DRAWN = (kernel, covariance, memory, state, stages)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def same(one: str, two: str) -> bool:
    """Whether two pictures are alike to a pixel: NumPy may round and draw a little otherwise."""
    if NUMBER.sub("#", one) != NUMBER.sub("#", two):
        return False
    pairs = zip(NUMBER.findall(one), NUMBER.findall(two), strict=True)
    return all(abs(float(a) - float(b)) < 1 for a, b in pairs)


def main() -> None:
    """Draws or checks all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a picture is out of date")
    check = parser.parse_args().check
    old = []
    for draw in DRAWN:
        path, text = PICTURES / f"{draw.__name__}.svg", draw().svg()
        if not path.exists() or not same(path.read_text(encoding="utf-8"), text):
            old.append(path.name)
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and old:
        raise SystemExit(f"error: draw anew {', '.join(old)}: python docs/_tools/pictures.py")


if __name__ == "__main__":
    main()
