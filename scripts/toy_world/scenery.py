"""The small things of landscapes: clouds, stars, grass, cacti, firs, waves; as shapes, and as pixel art.

Positions are in units of the picture's side; x is the middle of a thing and y its foot, unless it says otherwise.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from .canvas import Canvas, Colour

STARLIGHT: Colour = (255, 246, 190)


class SceneryCanvas(Canvas):
    """A canvas that knows how to paint the small things of a landscape, as shapes."""

    stars = 10  # faint ones in a night sky

    def begin(self, kind: str, foot: float) -> None:
        """Called before each thing of a scene, with the height of its lowest point: for canvases of hints."""

    def cloud(self, x: float, y: float, r: float, light: Colour, dark: Colour) -> None:
        """A cloud around (x, y), about 4 r wide, darker below."""
        puffs = ((-1.15, 0.28, 0.62), (-0.35, -0.12, 0.85), (0.5, 0.0, 0.78), (1.2, 0.3, 0.58))
        for shift, colour in ((0.16, dark), (0.0, light)):
            for dx, dy, part in puffs:
                self.ellipse(x + dx * r, y + (dy + shift) * r, part * r * 1.15, part * r * 0.75, colour)

    def star(self, x: float, y: float) -> None:
        """A bright star around (x, y)."""
        corners = [(0.026 if i % 2 == 0 else 0.3 * 0.026, i * math.pi / 4) for i in range(8)]
        self.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in corners], STARLIGHT)

    def grass(self, x: float, y: float, colour: Colour) -> None:
        """Three blades."""
        for lean in (-0.016, 0.0, 0.016):
            self.stroke([(x + 0.5 * lean, y), (x + 1.6 * lean, y - 0.04)], 0.011, colour)

    def starfish(self, x: float, y: float, colour: Colour) -> None:
        """A starfish around (x, y)."""
        corners = [((0.03 if i % 2 == 0 else 0.013), i * math.pi / 5) for i in range(10)]
        self.polygon([(x + r * math.sin(a), y - 0.8 * r * math.cos(a)) for r, a in corners], colour)

    def cactus(self, x: float, y: float, size: float, colour: Colour) -> None:
        """A cactus with two arms; at size 1 it is 0.18 high."""
        s = 0.02 * size
        self.stroke([(x, y), (x, y - 9 * s)], 2.2 * s, colour)
        self.ellipse(x, y - 9 * s, 1.1 * s, 1.1 * s, colour)
        for side, up in ((-1, 4.0), (1, 5.2)):
            arm = x + side * 2.6 * s
            self.stroke([(x, y - up * s), (arm, y - up * s)], 1.5 * s, colour)
            self.stroke([(arm, y - (up - 0.7) * s), (arm, y - (up + 2.4) * s)], 1.5 * s, colour)

    def fir(self, x: float, y: float, height: float, needles: Colour, snow: Colour) -> None:
        """A fir of three tiers with snow on each."""
        for i in range(3):
            top, half = y - height * (1 - 0.25 * i), height * (0.2 + 0.07 * i)
            foot = top + 0.5 * height
            self.polygon([(x, top), (x + half, foot), (x - half, foot)], needles)
            cap = [(x, top), (x + 0.5 * half, top + 0.25 * height), (x - 0.5 * half, top + 0.25 * height)]
            self.polygon(cap, snow)

    def wave(self, x: float, y: float, row: int, colour: Colour) -> None:
        """The crest of a wave around (x, y); higher rows (0 to 4) are nearer, so theirs are larger."""
        half = 0.045 + 0.012 * row
        points = [(x + half * (i / 6 - 1), y - 0.009 * math.sin(i * math.pi / 6)) for i in range(13)]
        self.stroke(points, 0.009 + 0.0014 * row, colour)


class PixelCanvas(SceneryCanvas):
    """A canvas for pixel art: gradients in bands, no outlines, and small things pixel by pixel."""

    stars = 7

    def __init__(self, side: int) -> None:
        super().__init__(side)
        self.bands = side // 2

    def stamp(self, pattern: str, x: float, y: float, **colours: Colour) -> None:
        """Rows of letters, each a colour or a point for none; (x, y) is the lower middle.

        It goes to even places: two pixels of pixel art are one latent, so the autoencoder sees one form, not four.
        """
        rows = pattern.split()
        left = 2 * round((x * self.side - len(rows[0]) / 2) / 2)
        top = 2 * round((y * self.side - len(rows)) / 2)
        for i, row in enumerate(rows):
            for j, letter in enumerate(row):
                if letter != ".":
                    self.point(left + j, top + i, colours[letter])

    def sprite(self, letters: np.ndarray, colours: np.ndarray, left: int, top: int) -> None:
        """A sprite (height, width) of indices of colours (n, 3); 0 is see-through."""
        mask = Image.fromarray(np.where(letters, 255, 0).astype(np.uint8))
        self.image.paste(Image.fromarray(colours[letters]), (left, top), mask)

    def cloud(self, x: float, y: float, r: float, light: Colour, dark: Colour) -> None:
        """Small clouds are stamped."""
        if r < 0.1:
            self.stamp("...ooo..... .ooooooooo. ooooooooooo .ddddddddd.", x, y + r, o=light, d=dark)
        else:
            super().cloud(x, y, r, light, dark)

    def star(self, x: float, y: float) -> None:
        """A cross."""
        self.stamp(".o. ooo .o.", x, y, o=STARLIGHT)

    def grass(self, x: float, y: float, colour: Colour) -> None:
        """Three pixels."""
        self.stamp("o.o .o.", x, y, o=colour)

    def starfish(self, x: float, y: float, colour: Colour) -> None:
        """Six pixels."""
        self.stamp(".o. ooo o.o", x, y, o=colour)

    def cactus(self, x: float, y: float, size: float, colour: Colour) -> None:
        """There is one size."""
        self.stamp("..o.. ..o.o o.o.o o.ooo ooo.. ..o.. ..o..", x, y, o=colour)

    def fir(self, x: float, y: float, height: float, needles: Colour, snow: Colour) -> None:
        """There is one height."""
        self.stamp("..o.. .wow. .ooo. .owo. woooo ooooo ooooo", x, y + 0.045, o=needles, w=snow)

    def wave(self, x: float, y: float, row: int, colour: Colour) -> None:
        """Two to four pixels in a line."""
        self.stamp("oo" + "o" * (row // 2), x, y, o=colour)
