"""What all tests share: an environment of their own, and the folders that they read."""

import atexit
import ctypes
import gc
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # no JAX before the environment is set
    from prompt_tuning_jax.config.experiment import Experiment
    from prompt_tuning_jax.inference.setup import Members

ROOT = Path(__file__).resolve().parents[1]


def _quick_compilation() -> list[str]:
    """Flags of XLA; most of a test is compiling, and quick programs are worth less to it."""
    flags = [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    version = importlib.metadata.version("jaxlib").split(".")
    if (int(version[0]), int(version[1])) < (0, 11):  # later ones end at a flag that is gone
        flags.append("--xla_cpu_use_fusion_emitters=false")  # by itself half of the time
    return flags


# The user's cache, where scripts/fetch_model puts models; tests have another one.  The processes of
# pytest-xdist inherit the tests' one, so this is kept beside it.
USER_CACHE = Path(
    os.environ.setdefault(
        "PROMPT_TUNING_JAX_USER_CACHE",
        os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
    )
)


def _set_environment() -> None:
    """Before anything imports JAX; the processes that tests start inherit it."""
    scratch = tempfile.mkdtemp(prefix="prompt_tuning_jax_tests_")
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = scratch  # tokenized examples never land in the user's cache
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What XLA compiled is kept between runs: a third of the time; `--cache-clear` forgets it.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ["XLA_FLAGS"] = " ".join(
        [*_quick_compilation(), os.environ.get("XLA_FLAGS", "")]
    ).strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


_set_environment()

# Tracing makes many objects that live on; looking through them often takes a tenth of the time.
gc.set_threshold(200_000, 20, 50)


def pytest_runtest_setup() -> None:
    """Runs share in a process what takes most of their time: compiled steps, and a picture."""
    run = sys.modules.get("prompt_tuning_jax.training.run")
    if run is not None and not hasattr(run.plot_curves, "drawn"):
        run.plot_curves = _drawn_once(run.plot_curves)  # type: ignore[attr-defined]
    build = sys.modules.get("prompt_tuning_jax.training.build")
    if build is not None and not hasattr(build.build_step, "steps"):
        build.build_step = _compiled_once(build.build_step)  # type: ignore[attr-defined]


_MOST_MEMORY = 1_500_000_000  # bytes of a process between two files of tests


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, None, None]:
    """Forgets the compiled programs of earlier files once they take gigabytes."""
    yield
    if nextitem is not None and nextitem.path == item.path:
        return
    statm = Path("/proc/self/statm")
    if "jax" in sys.modules and statm.exists():
        pages = int(statm.read_text().split()[1])
        if pages * os.sysconf("SC_PAGE_SIZE") > _MOST_MEMORY:
            sys.modules["jax"].clear_caches()
            gc.collect()
            with suppress(AttributeError):  # another C library than glibc
                ctypes.CDLL(None).malloc_trim(0)


def _drawn_once(plot_curves: Callable[..., None]) -> Callable[..., None]:
    drawn: list[bytes] = []

    def plot(metrics_jsonl: Path, png: Path, **options: object) -> None:
        if drawn:
            png.write_bytes(drawn[0])
            return
        plot_curves(metrics_jsonl, png, **options)
        drawn.append(png.read_bytes())

    plot.drawn = drawn  # type: ignore[attr-defined]
    return plot


def _compiled_once(build_step: Callable[..., Any]) -> Callable[..., Any]:
    """A step depends neither on a run's folder nor on its data, but for the inputs' length."""
    from prompt_tuning_jax.training import optim

    steps: dict[Any, Any] = {}

    def build(of: "Experiment", members: "Members", **options: Any) -> Any:
        state, step, rates = build_step(of, members, **options)
        data = type(of.data)(inputs_length=of.data.inputs_length)
        training = replace(of.training, workdir="", eval_every=1, save_every=1, log_every=1)
        # A test may replace the schedule.
        schedule = optim.make_schedule
        key = replace(of, data=data, training=training), members.graphdef, str(options), schedule
        return state, steps.setdefault(key, step), rates

    build.steps = steps  # type: ignore[attr-defined]
    return build


@pytest.fixture(scope="session")
def shared() -> Path:
    """Recorded reference numbers, labeled data and a corpus; they live beside the checkout."""
    return _folder(ROOT.parent / "shared", "reference data beside the checkout")


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The bundled T5 and its vocabulary."""
    return _folder(ROOT / "prompt_tuning_jax" / "assets" / "tiny", "the bundled model")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2 135M as a GGUF file."""
    return _fetched("smollm2")


@pytest.fixture(scope="session")
def gemma3_270m() -> Path:
    """Gemma 3 270M as a GGUF file."""
    return _fetched("gemma3-270m")


def _fetched(name: str) -> Path:
    """A model in the user's cache, fetched on CI; a test of a model that is missing is skipped."""
    from prompt_tuning_jax.config.paths import GGUF_MODELS

    path = USER_CACHE / "prompt_tuning_jax" / "models" / GGUF_MODELS[name]
    if not path.is_file() and os.environ.get("CI") == "true":
        command = [sys.executable, str(ROOT / "scripts" / "fetch_model"), name]
        environment = {**os.environ, "XDG_CACHE_HOME": str(USER_CACHE)}
        # Where there is no package index, the rest of the tests still says what it can.
        subprocess.run(command, check=False, env=environment)
    if not path.is_file():
        pytest.skip(f"no file {path}: python scripts/fetch_model {name}")
    return path


def _folder(path: Path, what: str) -> Path:
    if path.is_dir():
        return path
    reason = f"{what} is missing: no folder {path}"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
