"""Text from files, made safe to print: it may hold what steers a terminal."""

import re

# Control characters but the tab, line separators, what turns the direction of text, and halves of
# surrogate pairs, which cannot be printed at all.
_STEERING = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SHORT = {"\n": "\\n", "\r": "\\r"}


def printable(text: str) -> str:
    r"""The text in one line, with what steers a terminal written as in a program: ``\x1b``."""
    return _STEERING.sub(lambda found: _SHORT.get(found[0]) or _escaped(found[0]), text)


def printable_lines(text: str) -> str:
    """Each line of the text as ``printable`` has it."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(text: str) -> str:
    r"""JSON that means the same, with what steers a terminal written as ``\u001b``."""
    return _STEERING.sub(
        lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text
    )


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
