"""Renders a chat template; run as a script of its own by ``chat_template``.

Reads a JSON object from the standard input and writes one.  Imports nothing but Jinja, so that it
starts fast and a template has little to reach.  The arguments are the seconds of processor time
that it may use, and Jinja's folders.
"""

import json
import sys
from typing import Any, NoReturn

_MEMORY = 2**30  # bytes
_MESSAGE = 300  # characters of an error


def main() -> None:
    """Renders the template and writes ``{"text": ...}`` or ``{"error": ...}``."""
    _limit_resources(int(sys.argv[1]))
    sys.path += sys.argv[2:]
    given = json.load(sys.stdin)
    try:
        text = _render(given["template"], given["special"], given["message"], given["longest"])
        result = {"text": text}
    except MemoryError:
        result = {"error": "out of memory"}
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        result = {"error": f"{type(error).__name__}: {line}"[:_MESSAGE]}
    json.dump(result, sys.stdout)


def _limit_resources(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    for limit, most in (
        (resource.RLIMIT_AS, _MEMORY),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        try:
            resource.setrlimit(limit, (most, most))
        except (ValueError, OSError):
            continue  # macOS has no limit of the address space


def _render(template: str, special: dict[str, str], message: str, longest: int) -> str:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the model's answers, for masks that nobody needs here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), True)
            return body

    def raise_exception(text: str) -> NoReturn:
        raise TemplateError(str(text))

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    # As in transformers, but without ``strftime_now``: what a model reads depends on no date.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    parts = []
    rest = longest
    for part in environment.from_string(template).generate(
        messages=[{"role": "user", "content": message}],
        add_generation_prompt=True,
        tools=None,
        documents=None,
        **special,
    ):
        rest -= len(part)
        if rest < 0:
            raise TemplateError(f"it writes more than {longest} characters")
        parts.append(part)
    return "".join(parts)


if __name__ == "__main__":
    main()
