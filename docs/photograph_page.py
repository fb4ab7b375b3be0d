"""Take two screenshots of serve.py's page side by side: the same questions without drafts and with them.

    python docs/photograph_page.py docs/serve.png --model FILE.gguf [other arguments of serve.py]

Needs requirements-dev.txt and Debian's package chromium. The first answer is complete and shows the speed;
the second one is being written, in the right half with unverified drafts. Use an idle machine. The last line
has both speeds as one JSON object.
"""

import io
import json
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.servers import SERVE, started

WIDTH, HEIGHT, SCALE = 600, 700, 1.25  # of each half, and pixels per unit
GAP = 4  # pixels between the halves
# A fixed strategy: adaptive decoding depends on the load of the machine.
DEFAULT_ARGUMENTS = [
    *("--generation_strategy", "self_speculative", "--exit_layer", "30", "--num_speculations", "5"),
    *("--dtype", "float16", "--draft_weights", "int4", "--sample", "False"),
    *("--served_name", "SmolLM2-135M-Instruct"),
]
QUESTIONS = ["Explain in one paragraph how rainbows form.", "Give me three tips for sleeping better."]
# Replace the page with a copy, so that later tokens do not show.
FREEZE = """drafts => {
  const answer = document.querySelector(".turn:last-child .answer");
  const drafted = answer.querySelector(".draft")?.textContent ?? "";
  const isLong = drafted.trim().length >= 12 && !drafted.includes("\\n");
  if (answer.textContent.length < 140 || drafts && !isLong) return false;
  document.body.replaceWith(document.body.cloneNode(true));
  return true;
}"""


def main() -> None:
    path, *arguments = sys.argv[1:]
    command = [*SERVE, *DEFAULT_ARGUMENTS, *arguments]
    with started("serve.py", command) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE, color_scheme="dark"
        )
        page.set_default_timeout(300_000)  # ms
        for drafts in (False, True):
            page.goto(address)
            converse(page, drafts)  # not in the picture: first answers are slower
        speeds = []
        halves = []
        for drafts in (False, True):
            page.goto(address)
            converse(page, drafts)
            speeds.append(float(page.locator(".figures span:first-child b").inner_text()))
            halves.append(Image.open(io.BytesIO(page.screenshot(animations="disabled"))))
    left, right = halves
    picture = Image.new("RGB", (left.width + GAP + right.width, left.height), "#8a909c")
    picture.paste(left, (0, 0))
    picture.paste(right, (left.width + GAP, 0))
    picture.quantize(128).save(path, optimize=True)
    print(json.dumps({"tokens/s without drafts": speeds[0], "tokens/s": speeds[1]}))


def converse(page: Page, drafts: bool) -> None:
    """Ask all questions in a new chat, until the page of the last answer is frozen."""
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("switch").set_checked(drafts)
    for question in QUESTIONS:
        page.get_by_role("button", name="Send").wait_for()
        ask(page, question)
    page.wait_for_function(FREEZE, arg=drafts)


def ask(page: Page, question: str) -> None:
    page.get_by_role("textbox").fill(question)
    page.keyboard.press("Enter")


if __name__ == "__main__":
    main()
