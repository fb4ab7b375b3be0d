"""The chat page in a real browser, over a model that never ends by itself."""

import itertools
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import EOS, tiny_llama
from playwright.sync_api import expect, sync_playwright
from servers import GREEDY, Served, tiny_generator

CHROMIUM = shutil.which("chromium")
KEY = "secret"
MAX_TOKENS = 60
LONGEST = 1024  # prompt and answer together

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

# Records pending drafts, which are visible for milliseconds.
WATCH = """() => {
  window.drafted = [];
  new MutationObserver(() => {
    const pending = document.querySelector(".answer .draft")?.textContent;
    if (pending) window.drafted.push(pending);
  }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
# Presses the button at the first text, on a machine of any speed.
STOP_AT_ONCE = """() => new MutationObserver((_, observer) => {
  if (!document.querySelector(".answer .own, .answer .accepted")) return;
  observer.disconnect();
  document.getElementById("stop").click();
}).observe(document.getElementById("log"), {subtree: true, childList: true})"""


@pytest.fixture(scope="module")
def server(byte_tokenizer):
    """It drafts, is greedy, and needs a key."""
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
    """A page whose user has entered the key."""
    page = browser.new_page()
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(error))
    page.goto(server.url)
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading")).to_have_text("tiny")
    page.evaluate(WATCH)
    yield page
    page.close()
    assert wrong == []


def ask(page, question):
    page.get_by_role("textbox").fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def answered(server, *texts):
    """The server's answer outside the page."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    answer = server.client.chat.completions.create(model="tiny", messages=messages)
    return answer.choices[0].message.content


def test_a_conversation(page, server):
    """Guards against lost or doubled text, characters that the server counts otherwise, markup in messages,
    and turns that are missing from the next request.
    """
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    question = "<b>who</b> 🙂\nare you?"
    page.get_by_role("textbox").fill("<b>who</b> 🙂")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("are you?")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    answer = answered(server, question)
    turn = page.locator(".turn").first
    assert turn.locator(".question").text_content() == question
    assert turn.locator(".answer").text_content() == answer
    assert turn.locator(".accepted").count() > 0
    assert turn.locator(".own").count() > 0
    assert turn.locator(".draft").count() == 0
    assert len(page.evaluate("drafted")) > 5
    figures = turn.locator(".figures").inner_text()
    assert re.search(r"\d\.\d tokens/s", figures)
    assert re.search(r"\d+ % of \d+ drafted tokens accepted", figures)
    assert "cut off" in figures

    ask(page, "And you?")
    assert [message["content"] for message in sent[-1]["messages"]] == [question, answer, "And you?"]
    second = page.locator(".turn").nth(1)
    assert second.locator(".answer").text_content() == answered(server, question, answer, "And you?")
    cached, of = re.search(r"(\d+) of (\d+) prompt tokens cached", second.inner_text()).groups()
    assert 0 < int(cached) < int(of)

    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    ask(page, "And you?")
    assert len(sent[-1]["messages"]) == 1


@pytest.mark.slow
def test_without_drafts(page, server):
    """Guards against drafts that are made but not shown."""
    page.get_by_role("switch", name="drafts").uncheck()
    ask(page, "who are you?")
    assert page.locator(".answer").text_content() == answered(server, "who are you?")
    assert page.locator(".answer .accepted").count() == 0
    assert page.evaluate("drafted") == []
    figures = page.locator(".figures").inner_text()
    assert "tokens/s without drafts" in figures
    assert "accepted" not in figures


@pytest.mark.slow
def test_stop(page):
    """Guards against an answer that goes on, and an answer that the conversation loses."""
    page.evaluate(STOP_AT_ONCE)
    ask(page, "who are you?")
    text = page.locator(".answer").text_content()
    assert "stopped" in page.locator(".figures").inner_text()
    assert len(text) > 0
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    ask(page, "go on")
    assert sent[-1]["messages"][1] == {"role": "assistant", "content": text}


@pytest.mark.slow
def test_errors(page):
    """Guards against a question that its error loses, and an error that stays."""
    ask(page, "who " * LONGEST)
    expect(page.get_by_role("alert")).to_have_text(re.compile(str(LONGEST)))
    assert "\n" not in page.get_by_role("alert").inner_text()
    assert page.locator(".turn").count() == 0
    assert page.get_by_role("textbox").input_value().startswith("who who")
    ask(page, "who are you?")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert page.locator(".turn").count() == 1


@pytest.mark.slow
def test_a_wrong_key(browser, server):
    """Guards against a page that does not ask for the key again."""
    page = browser.new_page()
    page.goto(server.url)
    expect(page.get_by_label("API key")).to_be_focused(timeout=60_000)
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.get_by_role("alert")).to_have_text(re.compile("key", re.IGNORECASE))
    page.close()
