"""Photograph the page of serve.py while an answer is written, its drafts visible.

    python docs/photograph_page.py docs/serve.png --model FILE.gguf [other arguments of serve.py]

Needs requirements-dev.txt and Debian's package chromium. The last answer is caught in a moment when drafts
wait for their verification.
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))

from measures.servers import SERVE, started

WIDTH, HEIGHT, SCALE = 900, 600, 1.5
# A copy of all layers drafts, and always: adaptive decoding would depend on how busy the machine is.
DEFAULT_ARGUMENTS = [
    *("--generation_strategy", "self_speculative", "--exit_layer", "30", "--num_speculations", "5"),
    *("--draft_weights", "int4", "--sample", "False", "--served_name", "SmolLM2-135M-Instruct"),
]
QUESTIONS = {  # with drafts, or without
    "Write one sentence about the sea.": False,
    "Write one sentence about the mountains.": True,
    "Give me three tips for sleeping better.": True,
}
# The answer goes on, but into elements that are no longer shown.
FREEZE = """() => {
  const answer = document.querySelector(".turn:last-child .answer");
  const drafted = answer.querySelector(".draft")?.textContent ?? "";
  if (answer.textContent.length < 140 || drafted.trim().length < 12) return false;
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
        page.set_default_timeout(300_000)  # ms: also on a busy machine
        page.goto(address)
        for question, drafts in QUESTIONS.items():
            page.get_by_role("button", name="Send").wait_for()
            page.get_by_role("switch").set_checked(drafts)
            page.get_by_role("textbox").fill(question)
            page.keyboard.press("Enter")
        page.wait_for_function(FREEZE)
        Image.open(io.BytesIO(page.screenshot(animations="disabled"))).quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main()
