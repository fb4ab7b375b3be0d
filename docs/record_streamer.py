"""Record the answer of `make demo` at a terminal and draw it as an animated GIF, at the speed of the answer.

    python docs/record_streamer.py docs/streamer.gif --model FILE.gguf [other arguments of generate.py]

Needs requirements-dev.txt. Drawing begins after the program has ended, since it would slow it down. A frame
has all output of a moment, so tokens appear as fast as they did. Only pauses are shortened: one comes before
the last line, the comparison. The terminal is wider than any line; lines of the film break
between words. The last line of this script's output is one JSON object.
"""

import itertools
import json
import os
import sys
import time
from functools import cache
from pathlib import Path

import pexpect
import pyte
from matplotlib.font_manager import findfont
from PIL import Image, ImageColor, ImageDraw, ImageFont

COLUMNS, LINES, FONT_SIZE = 92, 27, 14  # of the film
WIDE = 1000  # columns of the terminal
FRAME = 0.04  # seconds; viewers slow down what is faster than 0.02
PAUSE = 1.5  # seconds: the longest pause
LAST = 6.0  # seconds that the last frame stays
PALETTE = {"default": "#d7dae0", "brown": "#e5b64c", "green": "#6cc26b"}  # pyte calls ANSI 33 brown
BACKGROUND = "#1d2026"
SHADES = 21  # of each colour, from that of the background on: letters have soft edges
# The demo of the Makefile.
DEFAULT_ARGUMENTS = [
    *("--dtype", "float16", "--chat", "True", "--sample", "False", "--max_steps", "120"),
    *("--streamer", "speculative"),
    *("--generation_strategy", "adaptive", "--draft_weights", "int4", "--compare", "True"),
    *("--prompt", "Give me three tips for sleeping better."),
]


def record(arguments: list[str]) -> list[tuple[float, str]]:
    """The program's output: seconds since the first output, text."""
    script = str(Path(__file__).parent.parent / "generate.py")
    child = pexpect.spawn(
        sys.executable, [script, *arguments], dimensions=(LINES, WIDE), encoding="utf-8", timeout=300,
        env={**os.environ, "TERM": "xterm-256color", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )  # fmt: skip
    written: list[tuple[float, str]] = []
    while True:
        try:
            text = child.read_nonblocking(1 << 16, timeout=300)
        except pexpect.EOF:
            break
        written.append((time.monotonic(), text))
    child.close()
    if child.exitstatus != 0:
        sys.exit("".join(text for _, text in written))
    return [(when - written[0][0], text) for when, text in written]


def film(written: list[tuple[float, str]]) -> tuple[list[Image.Image], list[int]]:
    """Frames of the terminal, and their durations in ms."""
    screen = pyte.Screen(WIDE, LINES)
    stream = pyte.Stream(screen)
    pictures = []
    numbers = []
    for number, group in itertools.groupby(written, key=lambda part: round(part[0] / FRAME)):
        stream.feed("".join(text for _, text in group))
        pictures.append(draw(screen))
        numbers.append(number)
    seconds = [min(PAUSE, FRAME * (after - before)) for before, after in itertools.pairwise(numbers)]
    return pictures, [round(1000 * duration) for duration in (*seconds, LAST)]


def draw(screen: pyte.Screen) -> Image.Image:
    font = ImageFont.truetype(findfont("DejaVu Sans Mono"), FONT_SIZE)
    width, height = round(font.getlength("m")), round(FONT_SIZE * 1.3)
    image = Image.new("RGB", (COLUMNS * width + 16, LINES * height + 16), BACKGROUND)
    pen = ImageDraw.Draw(image)
    rows = [[screen.buffer[row][column] for column in range(WIDE)] for row in range(screen.cursor.y + 1)]
    lines = [line for row in rows for line in wrapped(row, COLUMNS)]
    for row, line in enumerate(lines[-LINES:]):
        for column, cell in enumerate(line):
            if cell.data.strip():
                place = (8 + column * width, 8 + row * height)
                pen.text(place, cell.data, font=font, fill=PALETTE.get(cell.fg, PALETTE["default"]))
    return image.quantize(palette=palette(), dither=Image.Dither.NONE)


def wrapped(cells: list[pyte.screens.Char], width: int) -> list[list[pyte.screens.Char]]:
    """Lines of at most `width` cells, broken at spaces where there are any."""
    while cells and not cells[-1].data.strip():
        cells = cells[:-1]
    lines = []
    while len(cells) > width:
        end = next((n for n in range(width, 0, -1) if cells[n].data == " "), width)
        lines.append(cells[:end])
        cells = cells[end:] if cells[end].data != " " else cells[end + 1 :]
    return [*lines, cells]


@cache
def palette() -> Image.Image:
    """One palette for all frames. A palette of one frame may lack the colour of a few letters."""
    image = Image.new("P", (1, 1))
    background = ImageColor.getrgb(BACKGROUND)
    image.putpalette([
        round(back + (fore - back) * shade / (SHADES - 1))
        for colour in PALETTE.values()
        for shade in range(SHADES)
        for back, fore in zip(background, ImageColor.getrgb(colour), strict=True)
    ])  # fmt: skip
    return image


def main() -> None:
    path, *arguments = sys.argv[1:]
    written = record([*DEFAULT_ARGUMENTS, *arguments])
    (first, *later), durations = film(written)
    first.save(path, save_all=True, append_images=later, duration=durations, loop=0)
    print(json.dumps({"seconds": written[-1][0], "film_seconds": sum(durations) / 1000}))


if __name__ == "__main__":
    main()
