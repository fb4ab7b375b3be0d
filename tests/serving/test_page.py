"""The page that the server shows, in a real browser, over a model that never ends by itself."""

import itertools
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import EOS, tiny_llama
from playwright.sync_api import expect, sync_playwright
from servers import GREEDY, Served, held, tiny_generator

CHROMIUM = shutil.which("chromium")
KEY = "secret"
MAX_TOKENS = 32
LONGEST = 1024  # prompt and answer together

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

# Notes what is drafted, which is there for milliseconds, and counts blocks that are taken out of the page.
WATCH = """() => {
  window.drafted = [];
  window.removed = 0;
  new MutationObserver(changes => {
    const pending = document.querySelector(".answer .draft")?.textContent;
    if (pending) window.drafted.push(pending);
    for (const {removedNodes} of changes)
      window.removed += [...removedNodes].filter(({tagName}) => ["P", "DIV"].includes(tagName)).length;
  }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
# The answer at that place, and a text as Markdown that is rendered at once: tags and words.
SHOWN = """([index, text]) => {
  const answer = document.querySelectorAll(".answer")[index].cloneNode(true);
  for (const bar of answer.querySelectorAll(".bar")) bar.remove();
  const whole = document.createElement("div");
  const html = markdownit({html: false, breaks: true}).disable("image").render(text);
  whole.innerHTML = html.replace(/ style="[^"]*"/g, "");
  const tags = element => [...element.querySelectorAll(":not(div, span)")].map(({tagName}) => tagName);
  return [answer, whole].map(element => [tags(element), element.textContent.match(/\\S+/g)]);
}"""
# The text that is green, and the text that is not.
COLOURS = """() => {
  const answer = document.querySelector(".answer").cloneNode(true);
  const green = [...answer.querySelectorAll(".accepted")].map(element => element.textContent);
  for (const element of answer.querySelectorAll(".accepted, .bar")) element.remove();
  return [green.join(" "), answer.textContent];
}"""
# Words in capitals are drafted and accepted.
CODE = 'LET x = "</script>" &amp; 3;\n\nlet Y;\n'
MARKDOWN = f"""# A TITLE of it

A paragraph with **BOLD TEXT and less**, `CODE in it`, 3 \\* 4 &amp; a
[ LINK ](https://example.com/LINK "no").
its second line
- FIRST <b>not bold</b> ![picture](https://example.com/x.png)
  - NESTED

    ```js
    {CODE.replace(chr(10), chr(10) + "    ")}```

  AFTER the code
- third [link](javascript:alert(1)) [two]

| left | RIGHT |
|---|--:|
| A | b |

> QUOTED
lazily

````python
def F(x):
    ```

    return "🙂 <i>" + X * x
````
~~~
never CLOSED
    code"""


@pytest.fixture(scope="module")
def server(byte_tokenizer):
    """It drafts, is greedy, and answers whoever knows the key."""
    model = tiny_llama(vocab_size=len(byte_tokenizer), max_position_embeddings=LONGEST)
    torch.nn.init.zeros_(model.lm_head.weight[EOS])
    config = replace(GREEDY, max_steps=MAX_TOKENS)
    with Served(tiny_generator(model, byte_tokenizer, config), config, api_key=KEY) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM)


@pytest.fixture
def page(browser, server):
    """The page of somebody who has the key. It breaks no policy, and asks nobody but the server."""
    page = browser.new_page(permissions=["clipboard-read"])
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(error))
    page.on("console", lambda line: "Content Security Policy" in line.text and wrong.append(line.text))
    page.on("request", lambda request: request.url.startswith(server.url) or wrong.append(request.url))
    page.goto(server.url)
    say_key(page)
    page.evaluate(WATCH)
    yield page
    page.close()
    assert wrong == []


@pytest.fixture
def sent(page):
    """The bodies of the page's requests."""
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json))
    return bodies


def say_key(page):
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("tiny")


def answer_with(page, pieces):
    """Have the server answer with pieces of text: (text, number of accepted characters, pending draft, name
    of the field).
    """

    def choice(text, accepted, pending, name="content"):
        return {"delta": {name: text}, "draft": {"accepted": accepted, "pending": pending}}

    chunks = [{"choices": [choice(*piece)]} for piece in pieces]
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page.route("**/chat/completions", lambda route: route.fulfill(body=events))


def in_pieces(text, size):
    """Accepted are the words in capitals; each draft is the word that follows."""
    words = re.findall(r"\s+|\S+", text)
    for word, following in itertools.pairwise([*words, ""]):
        is_accepted = any(map(str.isupper, word)) and not any(map(str.islower, word))
        for start in range(0, len(word), size):
            part = word[start : start + size]
            yield part, len(part) if is_accepted else 0, following


def check_shown(page, index, text):
    answer, whole = page.evaluate(SHOWN, [index, text])
    assert answer == whole


def ask(page, question):
    page.get_by_role("textbox").fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def answered(server, *texts):
    """What the server answers to a program."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    answer = server.client.chat.completions.create(model="tiny", messages=messages)
    return answer.choices[0].message.content


def test_a_conversation(page, sent, server):
    """Guards against text that is lost or doubled between pieces, characters that are counted otherwise than
    the server counts them, markup that is not shown as text, and turns that are not sent again or do not
    survive a reload.
    """
    question = "<b>who</b> 🙂\nare you?"
    page.get_by_role("textbox").fill("<b>who</b> 🙂")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("are you?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    answer = answered(server, question)
    turn = page.locator(".turn").first
    assert turn.locator(".question").text_content() == question
    check_shown(page, 0, answer)
    assert turn.locator(".accepted").count() > 0
    assert turn.locator(".draft").count() == 0
    assert len(page.evaluate("drafted")) > 5
    figures = turn.locator(".figures").inner_text()
    assert re.search(r"\d\.\d tokens/s", figures)
    assert re.search(r"\d+ % of \d+ drafted tokens accepted", figures)
    assert "cut off" in figures

    ask(page, "And you?")
    assert [message["content"] for message in sent[-1]["messages"]] == [question, answer, "And you?"]
    second = page.locator(".turn").nth(1)
    check_shown(page, 1, answered(server, question, answer, "And you?"))
    cached, of = re.search(r"(\d+) of (\d+) prompt tokens cached", second.inner_text()).groups()
    assert 0 < int(cached) < int(of)

    before = page.locator(".log").inner_html()
    page.reload()
    assert page.locator(".log").inner_html() == before
    say_key(page)
    ask(page, "And now?")
    assert len(sent[-1]["messages"]) == 5

    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    page.reload()
    assert page.locator(".turn").count() == 0
    say_key(page)
    ask(page, "And you?")
    assert len(sent[-1]["messages"]) == 1


@pytest.mark.parametrize("size", [1, 1000])
def test_markdown(page, size):
    """Guards against lines that are rendered otherwise than the whole, a word in another's colour, and a copy
    of code that has the button's word or lacks a line.
    """
    answer_with(page, in_pieces(MARKDOWN, size))
    ask(page, "Markdown?")
    check_shown(page, 0, MARKDOWN)
    green, other = page.evaluate(COLOURS)
    assert not re.search("[a-z]", green)
    assert not re.search("[A-Z]{2}", other)
    assert page.locator(".answer :is(b, i, img, script)").count() == 0
    links = [link.get_attribute("href") for link in page.locator(".answer a").all()]
    assert links == ["https://example.com/LINK", "https://example.com/x.png"]
    assert page.locator("td").last.evaluate("cell => getComputedStyle(cell).textAlign").endswith("right")
    assert "monospace" in page.locator("code").last.evaluate("code => getComputedStyle(code).fontFamily")
    assert len(page.evaluate("drafted")) > 20
    if size == 1:  # the word comes back in 1.5 seconds
        page.get_by_role("button", name="Copy").first.click()
        expect(page.locator(".copy").first).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == CODE
        expect(page.locator(".copy").first).to_have_text("Copy")


def test_thinking_is_folded_away(page, sent):
    """Guards against thinking in the answer, markup in it that is rendered, and thinking that a reload or the
    next question loses: the template decides whether the model sees it.
    """
    thought = "The WORD *is* <b>x</b>\n\nso"
    pieces = [(*piece, "reasoning_content") for piece in in_pieces(thought, 3)]
    answer_with(page, [*pieces, *in_pieces("An *ANSWER*.", 1000)])
    ask(page, "Why?")
    for _ in range(2):
        thinking = page.locator(".answer details > div")
        expect(thinking).to_be_hidden()
        page.get_by_text("Thinking", exact=True).click()
        expect(thinking).to_be_visible()
        assert thinking.text_content() == thought
        assert "".join(thinking.locator(".accepted").all_text_contents()) == "WORD"
        assert page.locator(".answer > p").text_content() == "An ANSWER."
        page.reload()
    say_key(page)
    answer_with(page, pieces[:3])
    ask(page, "And?")
    assert sent[-1]["messages"][1] == {
        "role": "assistant", "content": "An *ANSWER*.", "reasoning_content": thought,
    }  # fmt: skip
    assert page.locator(".turn").last.locator("details").count() == 1


def test_a_long_answer(page):
    """Guards against flicker, and work that grows with each line: a complete block is not rendered again."""
    text = "".join(f"The {number}th PARAGRAPH.\n\n" for number in range(200))
    text += "```\n" + "x = 1\n" * 500 + "```\n"
    answer_with(page, in_pieces(text, 1000))
    ask(page, "Go on")
    check_shown(page, 0, text)
    assert page.evaluate("removed") < 3 * 200


@pytest.mark.parametrize("width", [360, 1100])
def test_phones_and_desktops(page, width):
    """Guards against a page that is wider than the window, and colours without a legend."""
    page.set_viewport_size({"width": width, "height": 700})
    models = {"data": [{"id": "a-model-with-a-long-name" * 3}]}
    page.route("**/models", lambda route: route.fulfill(json=models))
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text(re.compile("a-model"))
    answer_with(page, in_pieces(MARKDOWN + "x" * 300, 1000))
    page.locator(".examples button").first.click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert page.locator(".question").inner_text() == "Give me three tips for sleeping better."
    expect(page.locator(".legend")).to_be_visible()
    page.get_by_role("button", name="Settings").click()
    parts = page.locator("header > :visible, #settings > :visible, form > :visible, .answer > :visible")
    boxes = [part.bounding_box() for part in parts.all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
    assert page.evaluate("document.querySelector('main').scrollWidth") <= width


def test_the_first_page_begins_below_its_header(page):
    """Guards against a small window that opens at the end of the text."""
    page.set_viewport_size({"width": 400, "height": 400})
    header = page.locator("header").bounding_box()
    heading = page.get_by_role("heading", level=2).bounding_box()
    assert heading["y"] >= header["y"] + header["height"]


def test_settings(page, sent):
    """Guards against settings that are not sent or that a reload loses, and empty ones that are sent."""
    answer_with(page, in_pieces("An answer.", 1000))
    ask(page, "Who?")
    assert (sent[-1]["temperature"], sent[-1]["max_tokens"], len(sent[-1]["messages"])) == (None, None, 1)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Most tokens").fill("7")
    for _ in range(2):
        page.get_by_label("Message").fill("And?")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert (sent[-1]["temperature"], sent[-1]["max_tokens"]) == (0.5, 7)
        assert sent[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
        page.reload()
        expect(page.get_by_role("alert")).to_have_text("This server needs its key.")
        say_key(page)


@pytest.mark.slow
def test_stop_and_drafts_off(page, sent, server):
    """Guards against an answer that goes on, one that the conversation forgets, and a comparison with drafts
    that only aren't shown.
    """
    with held(server.engine, num_steps=5) as at_rest:
        page.get_by_role("textbox").fill("who are you?")
        page.keyboard.press("Enter")
        assert at_rest.wait(60)
        expect(page.locator(".answer")).not_to_be_empty()
        page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    answer = page.evaluate("turns[0].text")
    check_shown(page, 0, answer)
    assert answer
    assert "stopped" in page.locator(".figures").inner_text()
    page.get_by_role("switch", name="drafts").uncheck()
    page.evaluate("drafted = []")
    ask(page, "go on")
    assert sent[-1]["messages"][1] == {"role": "assistant", "content": answer}
    check_shown(page, 1, answered(server, "who are you?", answer, "go on"))
    assert page.locator(".turn").last.locator(".accepted").count() == 0
    assert page.evaluate("drafted") == []
    figures = page.locator(".figures").last.inner_text()
    assert "tokens/s without drafts" in figures
    assert "accepted" not in figures


@pytest.mark.slow
def test_errors(page):
    """Guards against a question that is lost with the error, an error that stays, and a page that does not
    ask for the key a second time.
    """
    alert = page.get_by_role("alert")
    ask(page, "who " * LONGEST)
    expect(alert).to_have_text(re.compile(str(LONGEST)))
    assert "\n" not in alert.inner_text()
    assert page.locator(".turn").count() == 0
    assert page.get_by_role("textbox").input_value().startswith("who who")
    ask(page, "who are you?")
    expect(alert).to_be_hidden()
    assert page.locator(".turn").count() == 1
    page.reload()
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    key.fill("wrong")
    page.keyboard.press("Enter")
    expect(alert).to_have_text(re.compile("key", re.IGNORECASE))
    expect(key).to_be_focused()
