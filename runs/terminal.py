"""A conversation at a terminal: prompts, commands and keys."""

import difflib
import re
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.output import create_output

from runs.conversation import Conversation
from runs.failures import reason
from runs.status import print_status

_COMMANDS = ("clear", "system", "exit")
# A path such as /etc/hosts is none.
_COMMAND = re.compile(r"\s*/(?P<name>[^\s/]*)(?:\s+(?P<text>.*?))?\s*", re.DOTALL)

_WELCOME = """Enter sends a prompt, Ctrl-C stops an answer. /clear forgets the conversation,
/system TEXT tells the model who it is, from now on; /exit or Ctrl-D leaves."""


@contextmanager
def _unechoed() -> Iterator[None]:
    """Do not echo keys in this block: they would appear in the answer."""
    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def converse(talk: Conversation) -> int:
    """Answer prompts from the terminal until /exit or Ctrl-D; the exit status."""
    session: PromptSession[str] = PromptSession(output=create_output(always_prefer_tty=True))
    print_status(_WELCOME)
    while True:
        try:
            prompt = session.prompt(">>> ")  # what was typed meanwhile is one, too
        except KeyboardInterrupt:  # Ctrl-C
            if not session.default_buffer.text:
                print_status("/exit or Ctrl-D leaves")
            continue
        except EOFError:  # Ctrl-D without text
            return 0
        if prompt.strip() == "/exit":
            return 0
        if not prompt.strip():
            continue
        if (status := obey(talk, prompt)) is not None:
            print_status(status)
            continue
        try:
            with _unechoed():
                talk.answer(prompt)
        except ValueError as error:
            print_status(f"error: {error}")
        except Exception as error:
            if (why := reason(error)) is None:
                raise
            print_status(f"\nerror: {why}")  # in the middle of an answer


def obey(talk: Conversation, prompt: str) -> str | None:
    """Follow a command; what to say. None: the prompt is for the model."""
    if (found := _COMMAND.fullmatch(prompt)) is None:
        return None
    name = found["name"]
    text = found["text"] or ""
    if name == "system":
        if not talk.chat:
            return "/system: needs --chat True, a prompt alone has no roles"
        talk.system = text
        return "the system prompt is set" if text else "there is no system prompt now"
    if name in _COMMANDS and text:
        return f"/{name}: takes no text; a prompt for the model has no / before it"
    if name == "clear":
        talk.messages.clear()
        return "the conversation is forgotten"
    near = difflib.get_close_matches(name.lower(), _COMMANDS, 1)
    if not near and (text or not re.fullmatch(r"\w*", name)):
        return None
    hint = f"did you mean /{near[0]}? " if near else ""
    return f"/{name}: no such command; {hint}there are /clear, /system TEXT, /exit"
