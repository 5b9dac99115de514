"""What a server refuses, and the refusal."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is refused, and how long anything may take."""

    body_bytes: int = 1_000_000
    inputs: int = 128  # in one request
    waiting_rows: int = 1024  # inputs times prompts, of all requests
    wait_seconds: float = 0.002
    deadline_seconds: float = 30.0


class RefusedError(Exception):
    """An answer that is none: an HTTP status, what is wrong, and in which field."""

    def __init__(
        self, status: int, message: str, *, field: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field
        self.retry_after = retry_after
