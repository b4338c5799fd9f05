"""The things as pixel art: a small and a big sprite a kind, one letter a pixel.

A letter is a tone of `Tones`: b base, l light, d dark, r roof, k ink, w white, s spot, o wood, O dark wood, g leaf,
G dark leaf, c cream, h shaded cream, y window, x black, e beak, p blush, u rubber, a grey; a point is see-through.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from .canvas import Tones, mix
from .extra import EXTRA_SPRITES

TONES = {
    "b": "base", "l": "light", "d": "dark", "r": "roof", "k": "ink", "w": "white", "s": "spot", "o": "wood",
    "O": "dark_wood", "g": "leaf", "G": "dark_leaf", "c": "cream", "y": "window", "x": "black", "e": "beak",
    "p": "blush", "u": "rubber", "a": "grey",
}  # fmt: skip
LETTERS = ".h" + "".join(TONES)


@cache
def sprite(kind: str, size: str) -> np.ndarray:
    """The sprite as places in LETTERS: (height, width) uint8; 0 is see-through."""
    small, big = EXTRA_SPRITES[kind] if kind in EXTRA_SPRITES else SPRITES[kind]
    rows = (big if size == "big" else small).split()
    return np.array([[LETTERS.index(letter) for letter in row] for row in rows], np.uint8)


def palette(tones: Tones) -> np.ndarray:
    """The colours of LETTERS: (n, 3) uint8; that of the see-through point is unused."""
    shaded = mix(tones.cream, tones.dark_wood, 0.25)
    return np.array([(0, 0, 0), shaded, *(getattr(tones, name) for name in TONES.values())], np.uint8)


SPRITES = {
    "house": (
        """
        ......kk.
        ..kkkkdk.
        .krrrrrk.
        krrrrrrrk
        kkkkkkkkk
        .kbbbbbk.
        .kybkkyk.
        .kbbOOdk.
        .kbbOOdk.
        """,
        """
        ..........kkk..
        ..........kdk..
        ...kkkkkkkkdk..
        ..krrrrrrrrrk..
        .krrrrrrrrrrrk.
        krrrrrrrrrrrrrk
        kkkkkkkkkkkkkkk
        .kbbbbbbbbbbdk.
        .kbyybbbbbyydk.
        .kbyybkkkbyydk.
        .kbbbkoookbbdk.
        .kbbbkoookbbdk.
        .kbbbkooykbbdk.
        .kbbbkoookbbdk.
        .kkkkkoookkkkk.
        """,
    ),
    "castle": (
        """
        .k.....k.
        krk.k.krk
        krk.kbkrk
        kkkkkkkkk
        kbdbbbdbk
        kydbbbdyk
        kbdbkbdbk
        kbdkOkdbk
        kkkkOkkkk
        """,
        """
        ..k.........k..
        .krk...kb..krk.
        .krk...kbb.krk.
        krrrk..kb.krrrk
        krrrk..k..krrrk
        kkkkkkkkkkkkkkk
        kbbdkbkbkbkbbdk
        kbydkbbbbbkbydk
        kbydkbbbbbkbydk
        kbbdkbkkkbkbbdk
        kbbdkkOOOkkbbdk
        kbbdkkOoOkkbbdk
        kbbdkkOoOkkbbdk
        kbbdkkOoOkkbbdk
        kkkkkkOoOkkkkkk
        """,
    ),
    "tree": (
        """
        ..kkkkk..
        .kllbbbk.
        kllbbbbdk
        klbbbbbdk
        kbbbbbddk
        .kbbdddk.
        ..kkOkk..
        ...OoO...
        ...OoO...
        """,
        """
        .....kkkkk.....
        ...kklllbbkk...
        ..kllllbbbbbk..
        .klllbbbbbbbdk.
        .kllbbbbbbbbdk.
        kbbbbbbbllbbddk
        kblllbblllbbddk
        kbllbbbbbbbbddk
        kbbbbbbbbbbdddk
        .kbbbddbbbdddk.
        ..kkddddddddk..
        ....kkkOOkkk...
        ......OoO......
        ......OoO......
        .....OoooO.....
        """,
    ),
    "flower": (
        """
        ..kkkkk..
        kkkbbbkkk
        kbbdbdbbk
        kbdOOOdbk
        .kkOoOkk.
        .kbdbdbk.
        ..kkGkk..
        .gg.G.gg.
        ..ggGgg..
        """,
        """
        .....kkkkk.....
        ....kbbbbbk....
        .kkkkbbbbbkkkk.
        kbbbbkbdbkbbbbk
        kbbbbdOOOdbbbbk
        kbbbdOoooOdbbbk
        .kkbdOoooOdbkk.
        ..kbbdOOOdbbk..
        ..kbbbkdkbbbk..
        ..kbbbkGkbbbk..
        ...kkk.G.kkk...
        .GG....G.......
        .GggG..G..GGG..
        ...GgG.G.GggG..
        .....GGGGGG....
        """,
    ),
    "mushroom": (
        """
        ..kkkkk..
        .kbbssbk.
        kbbbssbdk
        kssbbbbdk
        kssbbssdk
        kkkkkkkkk
        ..kcchk..
        ..kcchk..
        ..kkkkk..
        """,
        """
        .....kkkkk.....
        ...kkbbbbbkk...
        ..kbbssbbbbbk..
        .kbbbssbbbssbk.
        .kbbbbbbbbssdk.
        kbssbbbbbbbbddk
        kbssbbssbbbbddk
        kbbbbbssbbbbddk
        kbbbbbbbbbssddk
        .kkkkkkkkkkkkk.
        ....kcccchk....
        ....kcccchk....
        ....kcccchk....
        ...kccccchhk...
        ...kkkkkkkkk...
        """,
    ),
    "car": (
        """
        ..kkkkk..
        .kyykyyk.
        .kyykyyk.
        kbbbbbbbk
        kbbbbbbsk
        kuudddukk
        .uu...uu.
        """,
        """
        ...kkkkkkkk....
        ..kbbbbbbbbk...
        ..kyykyyyybk...
        .kbyykyyyyybk..
        kkbyykyyyyybkkk
        kbbbbkbbbbbbbbk
        kbbbbbbbbbbbbsk
        kddddddddddddsk
        kkuuukkkkkuuukk
        ..uau.....uau..
        ..uuu.....uuu..
        """,
    ),
    "boat": (
        """
        ....O....
        ...kOk...
        ..kbOck..
        .kbbOcck.
        .kbbOccck
        kkkkOkkkk
        ksssssssk
        kbbbbbbbk
        .kdddddk.
        """,
        """
        .....bbO.......
        ....bbbO.......
        .....bbOk......
        ......kOck.....
        .....kkOcck....
        ....kbkOccck...
        ...kbbkOccck...
        ...kbbkOcccck..
        ..kbbbkOcccck..
        .kbbbbkOccccck.
        kkkkkkkOkkkkkkk
        ksssssssssssssk
        kbbbbbbbbbbbbbk
        .kbbbbbbbbbbbk.
        ..kdddddddddk..
        """,
    ),
    "cat": (
        """
        kk...kk..
        kbkkkbk..
        kbbbbbk..
        kbxbxbk..
        kbbpbbk.k
        .kbbbk.bk
        kbblbbkbk
        kbblbbbbk
        kkkkkkkk.
        """,
        """
        .kk.......kk...
        .kbk.....kbk...
        .kpbkkkkkbpk...
        .kbbbbbbbbbk...
        kbbbbbbbbbbbk..
        kbbxbbbbbxbbk..
        kbbxbbbbbxbbk..
        kbpbbbxbbbpbkk.
        .kbbbbkbbbbkkbk
        ..kkkbbbkkk.kbk
        ...kbbbbbk..kbk
        ..kbblllbbk.kbk
        ..kbblllbbkkbk.
        ..kbblllbbbbk..
        ..kkkkkkkkkk...
        """,
    ),
    "duck": (
        """
        .kkk.....
        kbbbk....
        exbbk..k.
        eebbkkkbk
        .kbbbbbbk
        .kbbddbbk
        .kbbbdbdk
        ..kkkkkk.
        """,
        """
        ...kkkk........
        ..kbbbbk.......
        .kblbbbbk......
        .kbxbbbbk......
        eeexbbbbk...kk.
        eeebbbbbk..kbk.
        ..kbbbbkkkkkbbk
        ..kbbbbbbbbbbbk
        .kbbbbddddbbbbk
        .kbbbbbddddbbbk
        .kbbbbbbdddbbdk
        ..kbbbbbbbbbdk.
        ...kkkkkkkkkk..
        """,
    ),
    "mountain": (
        """
        ...k.....
        ..kwk....
        ..kwak...
        .kwwak.k.
        .kbwdkkwk
        kbbbddkbk
        kbbbddkdk
        kbbbbddkd
        """,
        """
        ....k..........
        ...kwk.........
        ...kwak........
        ..kwwak........
        ..kwwwak.......
        ..kwwwak..kk...
        .kwwbwadkkwak..
        .kbbbbbdkwwwak.
        .kbbbbbddkbwdk.
        kbbbbbbdddkbddk
        kbbbbbbddddkddk
        kbbbbbbbddddkdk
        """,
    ),
    "balloon": (
        """
        ..kkkkk..
        .kblblbk.
        kbblblbbk
        kbblblbbk
        .kblblbk.
        ..kbbbk..
        ...O.O...
        ...OoO...
        ...ooo...
        """,
        """
        .....kkkkk.....
        ...kkblblbkk...
        ..kbblbbblbbk..
        .kbbllbbbllbbk.
        .kbbllbbbllbbk.
        .kbbllbbbllbbk.
        .kbbllbbbllbbk.
        ..kbblbbblbbk..
        ...kbblblbbk...
        ....kblblbk....
        .....kbbbk.....
        .....O...O.....
        ......O.O......
        .....OoooO.....
        .....OoooO.....
        """,
    ),
    "kite": (
        """
        ....k....
        ...klk...
        ..klkbk..
        .kllkbbk.
        .kkkkkkk.
        ..kbkdk..
        ...kkk...
        ..bbObb..
        ....O....
        """,
        """
        .......k.......
        ......klk......
        .....klkbk.....
        ....kllkbbk....
        ...klllkbbbk...
        ..kllllkbbbbk..
        ..kkkkkkkkkkk..
        ...kbbbkdddk...
        ....kbbkddk....
        .....kbkdk.....
        ......kkk......
        .....bbObb.....
        .......O.......
        ......O........
        ....bbObb......
        """,
    ),
    "sun": (
        """
        b...b...b
        .bkkkkkb.
        .klxlxlk.
        .klllllk.
        bklxlxlkb
        .kllxllk.
        .kbbbbbk.
        .bkkkkkb.
        b...b...b
        """,
        """
        .......b.......
        ..b....b....b..
        ...b.kkkkk.b...
        ....klllllk....
        ...kllllllbk...
        ..kllxlllxlbk..
        ..kllxlllxlbk..
        bbkplllllllpkbb
        ..kllxlllxlbk..
        ..klllxxxllbk..
        ...klllllbbk...
        ....kbbbbbk....
        ...b.kkkkk.b...
        ..b....b....b..
        .......b.......
        """,
    ),
    "moon": (
        """
        ...kkkk..
        .kkllk...
        .klbk....
        klbk.....
        klbk.....
        klbbk..k.
        .kbbbkkbk
        ..kbbbbk.
        ...kkkk..
        """,
        """
        ......kkkkk....
        ....kkllbk.....
        ...klllbk......
        ..kllbbk.......
        .kllbbk........
        .kldbk.........
        kllbbk.........
        kllbbk.........
        kllbbbk........
        .kldbbk......k.
        .kllbbbkk..kkbk
        ..klbbbbbkkbbk.
        ...kbbbdbbbbk..
        ....kkbbbbkk...
        ......kkkk.....
        """,
    ),
}
