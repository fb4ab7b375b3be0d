"""Record `generate.py --streamer speculative` at a terminal and draw it as an animated GIF.

    python docs/record_streamer.py docs/streamer.gif --model FILE.gguf [other arguments of generate.py]

Needs requirements-dev.txt. Frames keep their real durations.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

import pexpect
import pyte
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

COLUMNS, LINES, FONT_SIZE = 84, 20, 15
PALETTE = {"default": "#d7dae0", "brown": "#e5b64c", "green": "#6cc26b"}  # pyte calls ANSI 33 brown
BACKGROUND = "#1d2026"
# The demo of the Makefile; the model is its own argument.
DEFAULT_ARGUMENTS = [
    *("--chat", "True", "--sample", "False", "--max_steps", "120", "--streamer", "speculative"),
    *("--generation_strategy", "adaptive", "--draft_weights", "auto", "--compare", "True"),
    *("--prompt", "Give me three tips for sleeping better."),
]


def record(arguments: list[str]) -> list[tuple[float, Image.Image]]:
    """Pictures of the terminal after each change, with the time of the change."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.Stream(screen)
    script = str(Path(__file__).parent.parent / "generate.py")
    child = pexpect.spawn(
        sys.executable, [script, *arguments], dimensions=(LINES, COLUMNS), encoding="utf-8", timeout=300,
        env={**os.environ, "TERM": "xterm-256color", "TQDM_DISABLE": "1"},
    )  # fmt: skip
    frames: list[tuple[float, Image.Image]] = []
    while True:
        try:
            text = child.read_nonblocking(1 << 16, timeout=300)
        except pexpect.EOF:
            return frames
        stream.feed(text)
        frames.append((time.monotonic(), draw(screen)))


def draw(screen: pyte.Screen) -> Image.Image:
    font = ImageFont.truetype(findfont("DejaVu Sans Mono"), FONT_SIZE)
    width, height = round(font.getlength("m")), round(FONT_SIZE * 1.3)
    image = Image.new("RGB", (COLUMNS * width + 16, LINES * height + 16), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for row in range(LINES):
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            if cell.data.strip():
                place = (8 + column * width, 8 + row * height)
                pen.text(place, cell.data, font=font, fill=PALETTE.get(cell.fg, PALETTE["default"]))
    return image.quantize(64)


def main() -> None:
    path, *arguments = sys.argv[1:]
    frames = record([*DEFAULT_ARGUMENTS, *arguments])
    times = [when for when, _ in frames]
    durations = [max(20, round((b - a) * 1000)) for a, b in itertools.pairwise(times)]
    first, *others = [image for _, image in frames]
    first.save(path, save_all=True, append_images=others, duration=[*durations, 4000], loop=0)


if __name__ == "__main__":
    main()
