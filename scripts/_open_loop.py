"""An open-loop load generator: arrivals do not wait for earlier requests to be answered."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_CONNECTIONS = 400
_IDLE = 2.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Load:
    """Each request's arrival time in ascending seconds, its task and its example."""

    at: list[float]
    task: list[int]
    example: list[int]


def poisson(rate: float, seconds: float, *, tasks: int, examples: int, seed: int = 0) -> Load:
    """Returns Poisson arrivals at ``rate`` per second, with uniform tasks and examples."""
    random = np.random.default_rng(seed)
    number = max(1, int(rate * seconds))
    return Load(
        at=np.cumsum(random.exponential(1 / rate, number)).tolist(),
        task=random.integers(0, tasks, number).tolist(),
        example=random.integers(0, examples, number).tolist(),
    )


async def ask_all(address: str, load: Load, bodies: Sequence[Any]) -> list[float | None]:
    """Returns the seconds from each arrival to its response, or None if the request failed."""
    host, port = address.removeprefix("http://").split(":")
    free: deque[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = deque()
    limit = asyncio.Semaphore(_CONNECTIONS)
    began = time.perf_counter()

    async def one(number: int) -> float | None:
        await asyncio.sleep(load.at[number] - (time.perf_counter() - began))
        body = bodies[load.example[number]](load.task[number])
        async with limit:
            # The server may be closing connections that have been idle for long.
            while free and time.perf_counter() - free[0][0] > _IDLE:
                free.popleft()[2].close()
            opened = free.pop()[1:] if free else await asyncio.open_connection(host, int(port))
            reader, writer = opened
            head = (
                f"POST /v1/predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            length = int(answer.partition("content-length:")[2].split("\r\n")[0])
            await reader.readexactly(length)
            free.append((time.perf_counter(), reader, writer))
        good = " 200 " in answer.split("\r\n", 1)[0]
        return time.perf_counter() - began - load.at[number] if good else None

    found = await asyncio.gather(*(one(number) for number in range(len(load.at))))
    for _, _, writer in free:
        writer.close()
    return found


def body_of(text: str, mode: str) -> Any:
    """Returns a function that maps a task's number to the request body for this text."""
    rest = f'"mode":"{mode}","inputs":[{json.dumps(text)}]'
    return lambda task: f'{{"task":"task_{task}",{rest}}}'.encode()
