"""Processes that see several devices."""

import os


def device_flags(count: int) -> str:
    """XLA_FLAGS for so many devices of the host, beside those that all tests run with."""
    own = os.environ.get("XLA_FLAGS", "")
    return f"{own} --xla_force_host_platform_device_count={count}".strip()


def with_devices(count: int, **environment: str) -> dict[str, str]:
    """This process's environment with so many devices."""
    return {**os.environ, **environment, "XLA_FLAGS": device_flags(count)}
