"""Chat templates: what a tokenizer's template puts around the message of a user.

A template is a program in Jinja from the model's files.  It is run once per model, in a process of
its own with little memory and time, and on a placeholder: it sees no text of a user.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prompt_tuning_jax.errors import UserError

_PLACEHOLDER = "user\ue000message"  # in the private use area, so that no template contains it
_LONGEST = 2**17  # characters of a template; the longest published ones have 30,000
_LONGEST_TEXT = 2**16  # characters around a message
_SECONDS = 20
_CPU_SECONDS = 5
_SCRIPT = Path(__file__).with_name("_render_chat.py")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """The text around the message of a user, up to where the model's answer begins.

    ``strips_start`` and ``strips_end``: whether the template removes blanks at the ends of the
    message.
    """

    before: str
    after: str
    strips_start: bool = False
    strips_end: bool = False

    def clean(self, message: str) -> str:
        """Returns the message as the template inserts it."""
        message = message.lstrip() if self.strips_start else message
        return message.rstrip() if self.strips_end else message


@functools.lru_cache(maxsize=16)
def render_chat(template: str, special: tuple[tuple[str, str], ...], *, of: str) -> ChatFormat:
    """Runs a template on one message of a user, with the prompt for the model's answer.

    Args:
      template: in Jinja, with the variables of transformers' ``apply_chat_template``.
      special: names and texts of special tokens, which templates use, such as ``bos_token``.
      of: the file, for messages.

    Raises UserError for a template that is invalid, too long or too slow, or does not contain the
    message once, and if Jinja is not installed.
    """
    if len(template) > _LONGEST:
        raise UserError(
            f"{of}: the chat template has {len(template):,} characters; at most {_LONGEST:,} are "
            "read"
        )
    rendered = _run(template, dict(special), f"  {_PLACEHOLDER}  ", of=of)
    before, placeholder, after = rendered.partition(_PLACEHOLDER)
    if not placeholder or _PLACEHOLDER in after:
        raise UserError(f"{of}: the chat template does not contain the user's message exactly once")
    strips_start, strips_end = not before.endswith("  "), not after.startswith("  ")
    return ChatFormat(
        before=before if strips_start else before[:-2],
        after=after if strips_end else after[2:],
        strips_start=strips_start,
        strips_end=strips_end,
    )


def _run(template: str, special: Mapping[str, str], message: str, *, of: str) -> str:
    try:
        import jinja2
        import markupsafe
    except ImportError:
        raise UserError(
            f"{of}: data.chat needs Jinja, which chat templates are written in: pip install jinja2"
        ) from None
    folders = {str(Path(str(library.__file__)).parents[1]) for library in (jinja2, markupsafe)}
    given = {"template": template, "special": dict(special), "message": message}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_SCRIPT), str(_CPU_SECONDS), *sorted(folders)],
            input=json.dumps({**given, "longest": _LONGEST_TEXT}).encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{of}: the chat template runs longer than {_SECONDS} seconds") from None
    except OSError as error:
        raise UserError(f"{of}: cannot run the chat template: {error.strerror or error}") from None
    try:
        result = json.loads(done.stdout)
    except ValueError:  # it was killed
        raise UserError(f"{of}: the chat template needs too much memory or time") from None
    if "error" in result:
        raise UserError(f"{of}: the chat template fails: {result['error']}")
    return str(result["text"])
