"""A conversation at a terminal: prompts, commands and keys."""

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

_COMMAND = re.compile(r"\s*/(?:(system)\b\s*(.*?)|(\w*))\s*", re.DOTALL)

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
        if found := _COMMAND.fullmatch(prompt):
            print_status(obey(talk, found[1] or found[3], found[2] or ""))
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


def obey(talk: Conversation, command: str, text: str) -> str:
    """Follow a command; what to say."""
    if command == "clear":
        talk.messages.clear()
        return "the conversation is forgotten"
    if command == "system":
        if not talk.chat:
            return "/system: needs --chat True, a prompt alone has no roles"
        talk.system = text
        return "the system prompt is set" if text else "there is no system prompt now"
    return f"/{command}: no such command, there are /clear, /system, /exit"
