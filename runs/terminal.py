"""A conversation at a terminal: prompts, commands and keys."""

import re
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_toolkit import PromptSession
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from runs.conversation import Conversation
from runs.failures import reason
from runs.status import print_status

_COMMAND = re.compile(r"\s*/(?:(system|save)\b\s*(.*?)|(\w*))\s*", re.DOTALL)


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
    session = _session()
    print_status("Type a prompt, Enter sends it. Ctrl-C stops an answer; /exit leaves, /help tells more.")
    while True:
        try:
            # What was typed meanwhile is a prompt, too.
            prompt = session.prompt(">>> ", prompt_continuation="... ")
        except KeyboardInterrupt:  # Ctrl-C
            if not session.default_buffer.text:
                print_status("/exit or Ctrl-D leaves")
            continue
        except EOFError:  # Ctrl-D without text
            return 0
        last_line = prompt.strip().rpartition("\n")[2].strip()
        if last_line == "/exit":  # even after other lines
            return 0
        if found := _COMMAND.fullmatch(prompt):
            print_status(talk.obey(found[1] or found[3], found[2] or ""))
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


def _session() -> PromptSession[str]:
    """A session that reads prompts; bracketed paste keeps pasted lines together."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif buffer.text.strip():
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(multiline=True, key_bindings=keys, output=create_output(always_prefer_tty=True))
