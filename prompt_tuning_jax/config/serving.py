"""Options of the server."""

from dataclasses import dataclass
from typing import ClassVar, Literal

Mode = Literal["label", "generate", "score"]


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """The shapes that programs are compiled for, in the order in which they are needed."""

    group: ClassVar[str] = "shapes to compile"

    lengths: tuple[int, ...] = (32, 64, 128, 256, 512)  # input lengths, in tokens
    batch_sizes: tuple[int, ...] = (1, 4, 16)  # numbers of rows
    modes: tuple[Mode, ...] = ("label", "generate", "score")  # kinds of requests
    max_new_tokens: int = 64  # longest generated text, in tokens
    slots: int = 16  # texts generated at once for inputs of the shorter half of the lengths
    long_slots: int = 8  # texts generated at once for longer inputs
    # Longest prompt; 0: the longest there is, and at least 100 with an admin token.
    max_prompt_length: int = 0
    cache_rows: int = 256  # prompts, and arrays of other methods, that the device holds


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """How much a request may ask for."""

    group: ClassVar[str] = "limits"

    max_inputs: int = 128  # inputs per request
    max_queue: int = 1024  # inputs times prompts that may wait
    max_wait_ms: float = 2.0  # how long a batch waits for more requests, in milliseconds
    deadline_seconds: float = 30.0  # longest time of a request


@dataclass(frozen=True, kw_only=True)
class ConnectionOptions:
    """How many connections are open."""

    group: ClassVar[str] = "connections"

    keep_alive: float = 5.0  # seconds that an idle connection stays open
    max_connections: int = 1000  # open connections; fewer where ulimit -n allows fewer
    # Open connections per address; behind a proxy, which is one address, as many as in all.
    max_client_connections: int = 500
    # Origins whose pages may send requests from a browser, for example https://example.org; * for
    # all.
    cors_origins: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Serving(ConnectionOptions, LimitOptions, ShapeOptions):
    """The options of ``prompt-tuning serve``."""
