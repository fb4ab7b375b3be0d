"""Take a screenshot of serve.py's page during an answer, with visible drafts.

    python docs/photograph_page.py docs/serve.png --model FILE.gguf [other arguments of serve.py]

Needs requirements-dev.txt and Debian's package chromium. The screenshot shows unverified drafts of the last
answer. It shows the speed of one answer without drafts and of one with drafts: use an idle machine, and take
another picture if drafts gain nothing. The last line has both speeds as one JSON object.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.servers import SERVE, started

WIDTH, HEIGHT, SCALE = 900, 780, 1.5
# A fixed strategy: adaptive decoding depends on the load of the machine.
DEFAULT_ARGUMENTS = [
    *("--generation_strategy", "self_speculative", "--exit_layer", "30", "--num_speculations", "5"),
    *("--draft_weights", "int4", "--sample", "False", "--served_name", "SmolLM2-135M-Instruct"),
]
WARM_UP = "Give me five tips for a good breakfast."  # not in the picture: a first answer is slower
QUESTIONS = {  # with drafts, or without
    "Explain in one paragraph how rainbows form.": False,
    "Write a Python function that adds two numbers.": True,
    "Give me three tips for sleeping better.": True,
}
# Replace the page with a copy, so that later tokens do not show.
FREEZE = """() => {
  const answer = document.querySelector(".turn:last-child .answer");
  const drafted = answer.querySelector(".draft")?.textContent ?? "";
  const isLong = drafted.trim().length >= 12 && !drafted.includes("\\n");
  if (answer.textContent.length < 140 || !isLong) return false;
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
        page.goto(address)
        ask(page, WARM_UP)
        page.get_by_role("button", name="Send").wait_for()
        page.get_by_role("button", name="New chat").click()
        for question, drafts in QUESTIONS.items():
            page.get_by_role("button", name="Send").wait_for()
            page.get_by_role("switch").set_checked(drafts)
            ask(page, question)
        page.wait_for_function(FREEZE)
        Image.open(io.BytesIO(page.screenshot(animations="disabled"))).quantize(128).save(path, optimize=True)
        without, drafted = page.locator(".figures span:first-child b").all_inner_texts()
    print(json.dumps({"tokens/s without drafts": float(without), "tokens/s": float(drafted)}))


def ask(page: Page, question: str) -> None:
    page.get_by_role("textbox").fill(question)
    page.keyboard.press("Enter")


if __name__ == "__main__":
    main()
