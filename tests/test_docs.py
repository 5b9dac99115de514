"""What README.md and docs/ show as links, commands and code works."""

import argparse
import ast
import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import prompt_tuning_jax as pt
from prompt_tuning_jax.checkpoints.prompt_file import PromptMetadata
from prompt_tuning_jax.checkpoints.run_folder import export_prompt
from prompt_tuning_jax.cli.experiment import ConfigOptions, OverrideOptions
from prompt_tuning_jax.cli.main import build_parser, parse
from prompt_tuning_jax.config.base import field_types
from prompt_tuning_jax.config.config_file import load_config
from prompt_tuning_jax.config.experiment import Experiment
from prompt_tuning_jax.config.gin import experiment_from_gin
from prompt_tuning_jax.config.overrides import apply_override, apply_overrides, to_json
from prompt_tuning_jax.config.validation import validate
from prompt_tuning_jax.data.tasks.registry import get_task
from prompt_tuning_jax.methods import METHODS, Context, MethodConfig, attach_method
from prompt_tuning_jax.models.t5.model import T5
from prompt_tuning_jax.serving.schema import Options, PredictRequest
from prompt_tuning_jax.typing import Array
from tests.micro import ONE_LAYER, D, call, make_t5, shifted
from tests.script import SCRIPTS, load_script
from tests.tiny_run import CONFIG, LABELS, experiment, model_folder

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in (
        *sorted(ROOT.glob("*.md")),
        *sorted(DOCS.glob("*.md")),
        ROOT / "prompt_tuning_jax" / "assets" / "tiny" / "README.md",
    )
}
TOKENS = np.array([[5, 6, 7, 1], [8, 9, 1, 0]], np.int32)
TARGETS = np.array([[0, 4], [0, 5]], np.int32)


def words_of(command: str, *, comments: bool = False) -> list[str]:
    """The words of a command as bash has them, whose $'...' makes line breaks of \\n."""
    quoted = re.sub(r"\$'([^']*)'", lambda m: shlex.quote(m[1].replace(r"\n", "\n")), command)
    return shlex.split(quoted, comments=comments)


def fenced(page: str, language: str) -> list[str]:
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```", PAGES[page].read_text(), re.S | re.M)
    return [re.sub(rf"^{indent}", "", code, flags=re.M) for indent, code in blocks]


def prose(page: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", PAGES[page].read_text(), flags=re.S | re.M)


def inline_code(page: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def anchor(title: str) -> str:
    """A heading as GitHub links to it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def command_lines(page: str) -> Iterator[str]:
    """All that a reader may copy to a shell: lines of blocks, and code within sentences."""
    for block in fenced(page, "bash"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from inline_code(page)


def prompt_tuning_commands() -> Iterator[tuple[str, list[str]]]:
    """Page and arguments of each prompt-tuning command, those behind a launch script's -- too."""
    for page in PAGES:
        for line in command_lines(page):
            launched = re.match(r"(?:bash )?scripts/launch_\w+\.sh .* -- (.*)", line)
            direct = re.match(r"prompt-tuning (.*)", line)
            if found := launched or direct:
                arguments = words_of(found[1], comments=True)
                if arguments[0].islower():  # not COMMAND
                    yield (
                        page,
                        arguments[: arguments.index(">>")] if ">>" in arguments else arguments,
                    )


def python_blocks() -> list[tuple[str, str]]:
    return [(page, code) for page in PAGES for code in fenced(page, "python")]


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, section = target.partition("#")
        path = PAGES[page].parent / name if name else PAGES[page]
        assert path.exists(), target
        titles = re.findall(r"^#+ (.*)", path.read_text(), re.M) if section else []
        assert not section or section in map(anchor, titles), target


def test_every_page_is_in_both_tables_of_contents() -> None:
    for contents, folder in (("README.md", "docs/"), ("docs/README.md", "")):
        text = PAGES[contents].read_text()
        for path in DOCS.glob("*.md"):
            assert path.name == "README.md" or f"({folder}{path.name})" in text


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_the_contents_of_a_page_are_its_sections(page: str) -> None:
    text = PAGES[page].read_text()
    listed = re.findall(r"^- \[.*\]\(#(.*)\)$", text, re.M)
    sections = re.findall(r"^## (.*)", text, re.M)
    assert not listed or listed == [anchor(title) for title in sections]


@pytest.mark.parametrize(
    ("page", "arguments"),
    [pytest.param(*one, id=f"{one[0]}: {shlex.join(one[1])}") for one in prompt_tuning_commands()],
)
def test_commands_parse(page: str, arguments: list[str]) -> None:
    command = parse(arguments)
    if not isinstance(command, OverrideOptions):
        return
    start = Experiment()
    if config := getattr(command, "config", None):
        given = ROOT / config
        # lora.py is in the reader's folder: `init` has written it.
        start = load_config(str(given if given.is_file() else ROOT / "configs" / config))
    if isinstance(command, ConfigOptions) and command.gin_file:
        files = [str(ROOT / file) for file in command.gin_file]
        start = experiment_from_gin(files, command.gin_bindings)
    validate(apply_overrides(start, command.all_overrides()))


@pytest.mark.parametrize("page", PAGES)
def test_scripts_and_configs_exist(page: str) -> None:
    for path in re.findall(r"(?<![\w/])(?:scripts|configs)/[\w./]*\w", PAGES[page].read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES)
def test_options_of_scripts_exist(page: str) -> None:
    for line in command_lines(page):
        if found := re.match(r"(?:python |bash )?(scripts/[\w.]+) (.*)", line):
            source = (ROOT / found[1]).read_text()
            for option in re.findall(r"--[a-z]\w*", found[2].partition(" -- ")[0]):
                assert re.search(rf"{option}\b", source), line


@pytest.mark.parametrize("page", PAGES)
def test_options_in_sentences_exist(page: str) -> None:
    commands = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    known = {
        name for parser in commands[0].choices.values() for name in parser._option_string_actions
    }
    scripts = "\n".join(path.read_text() for path in SCRIPTS.iterdir() if path.is_file())
    for code in inline_code(page):
        if found := re.match(r"--[a-z]\w*", code):
            assert found[0] in known or re.search(rf"{found[0]}\b", scripts), code


@pytest.mark.parametrize("page", PAGES)
def test_fields_in_sentences_exist(page: str) -> None:
    hints = field_types(Experiment)
    fields = {
        f"{group}.{field.name}"
        for group, annotation in hints.items()
        for cls in (METHODS.values() if annotation is MethodConfig else [annotation])
        for field in dataclasses.fields(cls)
    }
    for code in inline_code(page):
        match = re.fullmatch(rf"(?:--set )?((?:{'|'.join(hints)})\.(?!py$)[a-z]\w*)(=.*)?", code)
        assert match is None or match[1] in fields, code


@pytest.mark.parametrize(("page", "code"), python_blocks())
def test_python_names_exist(page: str, code: str) -> None:
    """Imports work, the package's names are public, and its functions take these arguments."""
    tree = ast.parse(code)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), page, "exec"), {})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pt":
            assert node.attr in pt.__all__
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("pt."):
            function: Callable[..., Any] = getattr(pt, ast.unparse(node.func)[3:])
            named = {word.arg or "": None for word in node.keywords}
            inspect.signature(function).bind(*[None for _ in node.args], **named)


def test_the_readmes_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = fenced("README.md", "python")
    run = tmp_path / "runs" / "quickstart"
    changes = {"training.seeds": (0, 1, 2), "data.labels": LABELS}
    run.mkdir(parents=True)
    (run / "experiment.json").write_text(to_json(experiment(run, changes)))
    for seed in (0, 1, 2):
        prompt_PD = np.random.default_rng(seed).normal(size=(5, CONFIG.embed_dim))
        metadata = PromptMetadata(labels=LABELS)
        export_prompt(run, f"seed_{seed}", prompt_PD.astype(np.float32), metadata)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"tiny"', repr(str(model_folder()))), "README.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 4


def test_the_config_of_the_guide_is_a_config() -> None:
    (code,) = [c for c in fenced("docs/getting_started.md", "python") if "get_config" in c]
    space: dict[str, Any] = {}
    exec(compile(code, "getting_started.md", "exec"), space)
    validate(space["get_config"]())


def test_requests_of_the_guide_are_requests() -> None:
    bodies = re.findall(r"-d '(.*)'", "\n".join(fenced("docs/serving.md", "bash")))
    assert len(bodies) > 2
    for body in bodies:
        PredictRequest.model_validate(json.loads(body))


def test_the_guides_name_everything() -> None:
    serving, methods = (PAGES[f"docs/{name}.md"].read_text() for name in ("serving", "methods"))
    assert [name for name in Options.model_fields if f"`{name}`" not in serving] == []
    assert [name for name in METHODS if f"`{name}`" not in methods] == []
    api = PAGES["docs/python_api.md"].read_text()
    assert [name for name in pt.__all__ if f"`{name}`" not in api] == []


def test_the_package_says_that_it_has_types() -> None:
    assert (ROOT / "prompt_tuning_jax" / "py.typed").is_file()


def test_the_configuration_reference_is_up_to_date() -> None:
    made = load_script("config_reference").reference()
    assert (DOCS / "configuration.md").read_text() == made, "run python scripts/config_reference"
    assert "| `training.steps` | `int` | `30000` | Optimizer steps" in made


def test_the_task_of_the_guide_is_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prompt_tuning_jax.data.tasks.registry._registered", {})
    (code,) = [block for _, block in python_blocks() if "register(" in block]
    exec(compile(code, "development.md", "exec"), {})
    task = get_task("parity")
    (first, *_), examples = task.load("validation"), list(task.load("train"))
    assert first == {"inputs": "parity: 900", "targets": "even"} and len(examples) == 900
    assert task.from_text is not None and task.from_text("7") == "parity: 7"
    assert task.score([first], ["odd"])["accuracy"] == 0


def test_the_method_of_the_guide_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for _, block in python_blocks() if "(MethodConfig)" in block]
    definition = code[code.index("class Factors") :]
    assert len(definition.strip().splitlines()) <= 25
    monkeypatch.setitem(METHODS, "input_scale", METHODS["none"])  # taken back after the test
    # Dataclasses look their module up.
    space: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, "development.md", "exec"), space)
    model: T5 = make_t5(ONE_LAYER)
    context, key = Context(), jax.random.key(0)
    config = apply_override(Experiment(), "method=input_scale").method
    assert type(config) is space["InputScale"] and validate(Experiment(method=config))
    attached = attach_method(model, config, key=key, context=context)
    same = call(model, TOKENS, shifted(TARGETS))
    np.testing.assert_allclose(attached(TOKENS, TARGETS), same, atol=1e-5)
    factors: Array = attached.method.factor_D.get_value()
    assert factors.shape == (D,)
    attached.method.factor_D.set_value(2 * factors)
    assert np.abs(attached(TOKENS, TARGETS) - same).max() > 1e-3


def test_the_table_of_the_originals_names_is_up_to_date() -> None:
    script = load_script("original_names")
    assert script.page() == script.PAGE.read_text(), "run python scripts/original_names"
    for row in script.rows():
        assert row["counterpart_is_there"] in ("yes", "partly", "no"), row
        assert row["counterpart"] or row["counterpart_is_there"] == "no", row
