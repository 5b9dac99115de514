"""The arguments of every command of ``prompt-tuning``."""

import argparse
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from prompt_tuning_jax.errors import UserError

# As argparse has it.
_INVALID_CHOICE = re.compile(r"(argument [^:]*: )invalid choice: '(.*)' \(choose from (.*)\)")
_MESH_FIELDS = ("data", "fsdp", "model", "dcn_data", "dcn_fsdp", "dcn_model")


def rewrite_gin_flags(argv: Sequence[str]) -> list[str]:
    """``--gin.NAME=VALUE`` -> ``--gin_bindings=NAME=VALUE``, as T5X does it."""
    for arg in argv:
        if arg.startswith("--gin.") and "=" not in arg:
            raise UserError(f"{arg}: expected --gin.NAME=VALUE, without spaces")
    return [
        f"--gin_bindings={arg.removeprefix('--gin.')}" if arg.startswith("--gin.") else arg
        for arg in argv
    ]


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; ``args.command`` names the command."""
    parser = _Parser(
        prog="prompt-tuning",
        description="Prompt tuning for T5 in JAX.",
        epilog="prompt-tuning COMMAND --help says more about each.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        help="show the versions of the package and of its libraries, and exit",
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True
    )

    train = _add_command(
        commands,
        "train",
        "train prompts, or another method, on a frozen T5",
        example="train configs/quickstart.py --set optimizer.learning_rate=0.1",
    )
    train.add_argument("config", nargs="?", metavar="CONFIG.py", help="file with get_config()")
    _add_config_options(train)
    _add_data_options(train)
    _add_device_options(train)
    train.add_argument("--workdir", metavar="FOLDER", help="where the run is kept; resumes a run")
    train.add_argument("--seeds", metavar="0,1,2", help="one prompt for each, trained at once")
    train.add_argument("--steps", metavar="N", help="optimizer steps; more let a run go on")
    train.add_argument("--batch_size", metavar="N", help="examples a step")
    train.add_argument("--learning_rate", metavar="RATE", help="of the optimizer")

    evaluate = _add_command(
        commands,
        "eval",
        "score prompts, or what other methods tuned, one by one, and the vote of them all",
        example="eval --prompt runs/quickstart --split test",
    )
    evaluate.add_argument(
        "config", nargs="?", metavar="CONFIG.py", help="default: the config of the prompt's run"
    )
    _add_prompt_option(evaluate)
    evaluate.add_argument("--split", help="split of the task (default: data.eval_split)")
    _add_config_options(evaluate)
    _add_data_options(evaluate)
    _add_device_options(evaluate)
    evaluate.add_argument("--output", metavar="FILE.json", help="also write the scores there")
    evaluate.add_argument(
        "--predictions",
        metavar="FILE",
        help="also write a row for each example: its input and target, each prompt's prediction, "
        "the vote, log-probabilities; JSON lines, or a table by .csv or .tsv",
    )

    predict = _add_command(
        commands,
        "predict",
        "print one prediction a line, for one text each",
        example="predict --prompt runs/quickstart lovely",
    )
    predict.description = (
        "Print one prediction a line: a label where labels are known, otherwise text. The wording "
        "that the prompt was trained with is put around each text (--raw leaves it out)."
    )
    predict.add_argument("text", nargs="*", metavar="TEXT", help="inputs (default: lines of stdin)")
    _add_prompt_option(predict)
    predict.add_argument(
        "--input",
        metavar="FILE",
        help="one input a line; a .jsonl, .json, .csv, .tsv or .parquet file is read as data, by "
        "the columns of the prompt's training, and needs no targets",
    )
    predict.add_argument(
        "--output",
        metavar="FILE",
        help="write there instead of to stdout; .jsonl and .json as --json, .csv and .tsv as a "
        "table with the columns of the input",
    )
    predict.add_argument(
        "--json", action="store_true", help="JSON lines, with log-probabilities and votes"
    )
    predict.add_argument(
        "--raw", action="store_true", help="inputs are the model's own: nothing is put around them"
    )
    predict.add_argument("--task", metavar="NAME", help="of a mixture that was trained on")
    predict.add_argument(
        "--config", metavar="CONFIG.py", help="default: the config of the prompt's run"
    )
    _add_config_options(predict)
    _add_device_options(predict)
    predict.add_argument("--model", metavar="NAME", help="bundled name or folder")

    plan = _add_command(
        commands,
        "plan",
        "say what a run needs on TPUs, with none attached",
        example="plan configs/paper.py --model t5_1_1_xxl --topology v5e:4x4",
    )
    plan.add_argument("config", nargs="?", metavar="CONFIG.py", help="file with get_config()")
    plan.add_argument(
        "--topology", metavar="KIND:SHAPE", help="v4, v5e, v5p or v6e, as in v5e:4x4, v5p:2x2x2"
    )
    plan.add_argument("--chips", type=_positive, metavar="N", help="in its place: so many chips")
    plan.add_argument("--kind", metavar="KIND", help="of --chips (default: v5e)")
    plan.add_argument(
        "--mesh", metavar="data=2,model=8", help="(default: the fastest that fits, of those tried)"
    )
    plan.add_argument(
        "--tries", type=_positive, metavar="N", help="meshes to compile for (default: 2)"
    )
    plan.add_argument("--train_only", action="store_true", help="leave the eval step out")
    plan.add_argument("--json", action="store_true", help="everything, as JSON")
    _add_config_options(plan)
    plan.add_argument("--model", metavar="NAME", help="published size, bundled name or folder")

    _add_init(commands)
    tasks = _add_command(
        commands,
        "tasks",
        "list the tasks, or show examples of one",
        example="tasks word_valence --split test",
    )
    tasks.add_argument("name", nargs="?", metavar="NAME", help="show examples of this task")
    tasks.add_argument("--all", action="store_true", help="list every name, each form of a task")
    tasks.add_argument("--split", help="(default: train)")
    tasks.add_argument("--limit", type=_positive, metavar="N", help="(default: 5)")
    _add_data_dir_option(tasks)
    _add_module_option(tasks)
    tasks.add_argument("--model", metavar="NAME", help="whose vocabulary (default: tiny)")
    tasks.add_argument("--vocabulary", metavar="FILE", help="in its place; bytes for ByT5's")
    tasks.add_argument(
        "--dump", metavar="FILE.jsonl", help="write all examples: texts, and ids untrimmed with EOS"
    )

    metrics = _add_command(
        commands,
        "metrics",
        "score anybody's predictions for a task",
        example="metrics super_glue_rte_v102 --data_dir D --predictions FILE",
    )
    metrics.add_argument("name", metavar="NAME", help="task")
    metrics.add_argument(
        "--predictions",
        metavar="FILE",
        required=True,
        help='one a line: bare as in True, as a JSON string "True", or as predict --json has it',
    )
    metrics.add_argument("--split", default="validation", help="(default: validation)")
    _add_data_dir_option(metrics)
    _add_module_option(metrics)
    metrics.add_argument(
        "--leaderboard", metavar="FILE.jsonl", help="also write them as SuperGLUE's server wants"
    )

    inspect = _add_command(
        commands,
        "inspect",
        "say what a model folder, prompt file or run is",
        example="inspect runs/quickstart",
    )
    inspect.add_argument("path", metavar="PATH", help="also tiny, a published name, gs://...")
    inspect.add_argument("--json", action="store_true", help="for programs to read")
    inspect.add_argument(
        "--fingerprint", action="store_true", help="also of a large model, by reading all of it"
    )
    _add_convert(commands)
    _add_merge(commands)
    _add_similar(commands)
    _add_recycle(commands)
    _add_suite(commands)
    _add_transfer(commands)
    _add_serve(commands)
    _add_completion(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, as all errors are said, and what may have been meant."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; remembers what was given."""
        self._given = args or ()
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UserError; a mistyped option is told before what is missing because of it."""
        from prompt_tuning_jax.errors import suggest

        options = [name for name in self._option_string_actions if name.startswith("--")]
        for arg in self._given:
            if self._subparsers is not None and not arg.startswith("-"):
                break  # a command, with options of its own
            name = arg.partition("=")[0]
            if name.startswith("--") and name != "--" and name not in options:
                raise UserError(f"unknown argument {name!r}: {suggest(name, options)}")
        if found := _INVALID_CHOICE.fullmatch(message):
            choices = re.findall(r"[^\s',]+", found[3])
            near = suggest(found[2], choices, most=len(choices))
            message = f"{found[1]}invalid choice: {found[2]!r}: {near}"
        raise UserError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Prints the version, and those of what it stands on."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        from prompt_tuning_jax import __version__

        others = [f"Python {platform.python_version()}"]
        for name in ("jax", "jaxlib", "flax", "optax"):
            with suppress(PackageNotFoundError):
                others.append(f"{name} {version(name)}")
        print(f"{parser.prog} {__version__} ({', '.join(others)})")
        parser.exit()


def _add_init(commands: Any) -> None:
    init = _add_command(
        commands,
        "init",
        "write an example config to start from, or list them",
        example="init own_data.py",
    )
    init.add_argument("name", nargs="?", metavar="EXAMPLE", help="which one (default: list all)")
    init.add_argument("--output", metavar="FILE", help="(default: its name, in this folder)")
    init.add_argument("--overwrite", action="store_true", help="replace FILE")


def _add_completion(commands: Any) -> None:
    completion = _add_command(
        commands,
        "completion",
        "print what makes a shell complete commands and options",
        example="completion bash >> ~/.bashrc",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _add_suite(commands: Any) -> None:
    suite = _add_command(
        commands,
        "suite",
        "train and evaluate all tasks of a benchmark, and print the table",
        example="suite super_glue --config configs/suite_tiny.py --data_dir D --workdir runs/suite",
    )
    suite.add_argument("name", metavar="SUITE", help="super_glue or glue")
    suite.add_argument("--tasks", default="", metavar="rte,cb", help="only these")
    suite.add_argument(
        "--halve",
        default="",
        metavar="boolq",
        help="train on half of the validation split, for want of training files; not official",
    )
    _add_options_of_many(suite)


def _add_transfer(commands: Any) -> None:
    transfer = _add_command(
        commands,
        "transfer",
        "train on one task, evaluate on others: prompts against model tuning",
        example="transfer --from squad --to mrqa --config CONFIG.py --data_dir D --workdir runs/t",
    )
    transfer.add_argument("--from", dest="source", required=True, metavar="TASK")
    transfer.add_argument(
        "--to", dest="targets", required=True, metavar="A,B", help="mrqa: its out-of-domain sets"
    )
    transfer.add_argument(
        "--methods", default="prompt_tuning,model_tuning", metavar="A,B", help="(default: both)"
    )
    transfer.add_argument(
        "--model_set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="--set for model tuning, which has an optimizer of its own; repeatable",
    )
    _add_options_of_many(transfer)


def _add_options_of_many(parser: argparse.ArgumentParser) -> None:
    """What a command of many runs takes."""
    parser.add_argument("--config", metavar="CONFIG.py", help="done for each task")
    parser.add_argument(
        "--form",
        default="taskless",
        metavar="FORM",
        help="ordinary, taskless or task_index (default: taskless)",
    )
    parser.add_argument(
        "--workdir", metavar="FOLDER", help="where runs and tables are kept; goes on where stopped"
    )
    parser.add_argument("--seeds", metavar="0,1,2", help="(default: the config's, or 0,1,2,3,4)")
    parser.add_argument("--steps", metavar="N", help="how many optimizer steps")
    parser.add_argument("--model", metavar="NAME", help="bundled name or folder")
    _add_data_dir_option(parser)
    _add_config_options(parser)


def _add_serve(commands: Any) -> None:
    serve = _add_command(
        commands,
        "serve",
        "answer for all tasks at once over HTTP, with one frozen model",
        example="serve --prompts runs/quickstart",
    )
    serve.description = (
        "Serve prompts and what other methods tuned on one frozen model over HTTP: every batch "
        "mixes the tasks of prompts, and those of other methods have batches of their own. DIR is "
        "a run's folder, which is one task, named as what it was trained on (for a file of "
        "examples its name, or its folder's where that is train), its seeds an ensemble. Or DIR "
        "holds tasks: NAME.safetensors, NAME.npy or a PEFT adapter's folder NAME is task NAME; a "
        "folder NAME of several, or a run NAME, is task NAME with an ensemble; of what was "
        "trained on a mixture each task is NAME.TASK. Inputs get the wording that the prompts were "
        "trained with, unless a request says raw. Environment: PROMPT_TUNING_TOKEN "
        "is asked of predictions where it is set; PROMPT_TUNING_ADMIN_TOKEN allows PUT and DELETE "
        "/v1/tasks/NAME, whose changes are kept in DIR/.served; other servers of DIR follow them."
    )
    serve.add_argument("--prompts", required=True, metavar="DIR", help="what to serve")
    serve.add_argument("--model", metavar="NAME", help="(default: the run's, or tiny)")
    serve.add_argument("--host", default="127.0.0.1", help="(default: 127.0.0.1, this machine)")
    serve.add_argument(
        "--port", type=_port, default=8000, metavar="N", help="0: a free one (default: 8000)"
    )
    serve.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="model.dtype=bfloat16 ..."
    )
    serve.add_argument("--mesh", metavar="data=2,model=4", help="devices along the axes")
    shapes = serve.add_argument_group("shapes, compiled in the order in which they are needed")
    shapes.add_argument("--lengths", type=_numbers, metavar="32,64", help="of inputs, in tokens")
    shapes.add_argument("--batch_sizes", type=_numbers, metavar="1,4,16", help="in rows")
    shapes.add_argument(
        "--modes", type=_modes, metavar="label,score,generate", help="(default: all)"
    )
    shapes.add_argument("--max_new_tokens", type=_positive, metavar="N", help="(default: 64)")
    shapes.add_argument(
        "--slots", type=_positive, metavar="N", help="texts written at once (default: 16)"
    )
    shapes.add_argument(
        "--max_prompt_length",
        type=_positive,
        metavar="N",
        help="(default: the longest; with an admin token at least 100)",
    )
    shapes.add_argument(
        "--cache_rows",
        type=_positive,
        metavar="N",
        help="prompts, and what methods tuned, on the device (default: 256)",
    )
    limits = serve.add_argument_group("limits")
    limits.add_argument(
        "--max_inputs", type=_positive, metavar="N", help="a request (default: 128)"
    )
    limits.add_argument(
        "--max_queue",
        type=_positive,
        metavar="N",
        help="inputs times prompts that may wait (default: 1024)",
    )
    limits.add_argument(
        "--max_wait_ms", type=_positive, metavar="N", help="for others to join (default: 2)"
    )
    limits.add_argument(
        "--deadline_seconds", type=_positive, metavar="N", help="of a request (default: 30)"
    )
    connections = serve.add_argument_group("connections")
    connections.add_argument(
        "--keep_alive",
        type=_positive,
        metavar="SECONDS",
        help="how long an idle connection stays open for the next request (default: 5)",
    )
    connections.add_argument(
        "--max_connections",
        type=_positive,
        metavar="N",
        help="open at once (default: 1000, or as many as ulimit -n allows)",
    )
    connections.add_argument(
        "--max_client_connections",
        type=_positive,
        metavar="N",
        help="of one address; behind a proxy, which is one, as many as in all (default: 500)",
    )
    connections.add_argument(
        "--cors_origins",
        type=_names,
        metavar="https://example.org",
        help="whose pages may ask from a browser, with commas between; * for all (default: none)",
    )


def _add_convert(commands: Any) -> None:
    convert = _add_command(
        commands,
        "convert",
        "write a model, a prompt or what a method tuned in another format",
        example="convert runs/quickstart prompts_for_peft --to peft",
    )
    convert.add_argument(
        "source", metavar="SOURCE", help="a model's folder or name, a prompt, an adapter, or a run"
    )
    convert.add_argument(
        "destination", metavar="DESTINATION", help="new file or folder; *.npy and so on tell --to"
    )
    convert.add_argument(
        "--to",
        choices=("hf", "t5x", "npy", "safetensors", "peft"),
        help="models: hf, t5x (native, version 3); prompts and tuned: npy, safetensors, peft",
    )
    convert.add_argument(
        "--dtype",
        choices=("stored", "float32", "bfloat16"),
        help="of the numbers written (default: stored, which loses nothing)",
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="replace what is at DESTINATION, at the end"
    )
    models = convert.add_argument_group("models")
    models.add_argument("--prompt", metavar="PATH", help="t5x: trained prompt to put inside")
    models.add_argument(
        "--step", type=_from_zero, metavar="N", help="t5x: (default: the source's, or 0)"
    )
    models.add_argument(
        "--unscan", action="store_true", help="t5x: a name for each of a scanned source's layers"
    )
    models.add_argument(
        "--vocabulary", metavar="FILE", help="in place of the source's; bytes for ByT5's"
    )
    models.add_argument(
        "--relpos_max_distance",
        type=_positive,
        metavar="N",
        help="hf: of a T5X source, which does not say it (default: 128 for 32 buckets)",
    )
    models.add_argument(
        "--max_shard_size",
        dest="max_shard_bytes",
        type=_size,
        metavar="SIZE",
        help="hf: largest file, and what is held in memory at once, as in 500MB (default: 2GB)",
    )
    prompts = convert.add_argument_group("prompts, and what other methods tuned")
    prompts.add_argument(
        "--model",
        metavar="NAME",
        help="frozen model that it is for: peft wants its name, adapters its shapes",
    )
    prompts.add_argument(
        "--allow_other_model",
        action="store_true",
        help="also for a model of the same width that it was not trained for",
    )


def _add_merge(commands: Any) -> None:
    merge = _add_command(
        commands,
        "merge",
        "write the model that a run has tuned, with what it tuned merged into the weights",
        example="merge runs/lora merged --to hf",
    )
    merge.add_argument("source", metavar="RUN", help="a run's folder: lora, ia3, full or pattern")
    merge.add_argument("destination", metavar="FOLDER", help="new folder")
    merge.add_argument("--to", choices=("hf",), default="hf", help="(default: hf)")
    merge.add_argument("--member", metavar="NAME", help="of several, for instance seed_0")
    merge.add_argument(
        "--dtype",
        choices=("stored", "float32", "bfloat16"),
        help="of the numbers written (default: stored, what the run held its weights in)",
    )
    merge.add_argument(
        "--max_shard_size",
        dest="max_shard_bytes",
        type=_size,
        metavar="SIZE",
        help="largest file, as in 500MB (default: 2GB)",
    )
    merge.add_argument(
        "--overwrite", action="store_true", help="replace what is at FOLDER, at the end"
    )


def _add_similar(commands: Any) -> None:
    similar = _add_command(
        commands,
        "similar",
        "list prompts by their similarity to one, which is that of their tasks (SPoT)",
        example="similar new.safetensors --among runs/a runs/b --top 3 --output start.safetensors",
    )
    similar.add_argument("source", metavar="PROMPT", help="a prompt file or adapter")
    similar.add_argument(
        "--among",
        nargs="+",
        required=True,
        metavar="PROMPTS",
        help="prompt files, folders of them, runs",
    )
    similar.add_argument(
        "--by",
        choices=("mean", "tokens"),
        default="mean",
        help="cosine of the mean positions, or mean cosine of all pairs (default: mean)",
    )
    similar.add_argument("--top", type=_positive, metavar="K", help="only the nearest K")
    similar.add_argument("--json", action="store_true", help="for programs to read")
    similar.add_argument(
        "--output",
        metavar="FILE",
        help="write the nearest one, or the mixture of --top, to start a training from",
    )
    similar.add_argument("--overwrite", action="store_true", help="replace FILE")


def _add_recycle(commands: Any) -> None:
    recycle = _add_command(
        commands,
        "recycle",
        "carry a prompt to another model of the same vocabulary",
        example="recycle runs/quickstart --from tiny --to my_model --output recycled",
    )
    recycle.add_argument("source", metavar="PROMPT", help="a prompt, a folder of them, or a run")
    recycle.add_argument(
        "--from", dest="from_model", required=True, metavar="MODEL", help="that it was trained on"
    )
    recycle.add_argument(
        "--to", dest="to_model", required=True, metavar="MODEL", help="that it is to be used on"
    )
    recycle.add_argument(
        "--output", required=True, metavar="FILE", help="new prompt; of several a folder"
    )
    recycle.add_argument(
        "--by",
        choices=("linear", "mlp", "combination"),
        default="linear",
        help="what takes the embeddings of one model to those of the other (default: linear)",
    )
    recycle.add_argument(
        "--pieces",
        type=_positive,
        metavar="N",
        help="fit on the N most common pieces of the vocabulary (default: all)",
    )
    recycle.add_argument(
        "--terms", type=_positive, metavar="N", help="combination: pieces at most (default: 64)"
    )
    recycle.add_argument(
        "--steps", type=_positive, metavar="N", help="mlp: steps of training (default: 200)"
    )
    recycle.add_argument("--seed", type=_from_zero, metavar="N", help="mlp: (default: 0)")
    recycle.add_argument("--json", action="store_true", help="for programs to read")
    recycle.add_argument(
        "--allow_other_model",
        action="store_true",
        help="also a prompt that was not trained on --from",
    )
    recycle.add_argument("--overwrite", action="store_true", help="replace what is at FILE")


def _add_command(commands: Any, name: str, what: str, *, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"example: prompt-tuning {example}",
        allow_abbrev=False,
    )
    # What an unknown argument is compared with.
    parser.set_defaults(options=parser._option_string_actions)
    return parser


def _add_device_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--mesh",
        metavar="data=2,model=4",
        help="devices along the axes data, fsdp and model (also dcn_data... for slices); -1: rest",
    )
    group.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="of process 0, where several hosts do not find each other by themselves "
        "(TPU pods, SLURM and Kubernetes do)",
    )
    group.add_argument(
        "--process_count", type=_positive, metavar="N", help="how many processes; 1: this one alone"
    )
    group.add_argument("--process_index", type=_from_zero, metavar="I", help="which one this is")
    group.add_argument(
        "--process_timeout",
        type=_positive,
        default=60,
        metavar="SECONDS",
        help="without a sign of life from a process before the others stop (default: 60)",
    )


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("config")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace any field, for instance optimizer.learning_rate=0.1; repeatable",
    )
    group.add_argument(
        "--gin_file", action="append", default=[], metavar="FILE.gin", help="repeatable"
    )
    group.add_argument(
        "--gin_search_paths", default="", metavar="A,B", help="folders to look for gin files in"
    )
    group.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a macro or parameter; also written --gin.NAME=VALUE; repeatable",
    )


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", metavar="NAME", help="bundled name or folder")
    group.add_argument(
        "--data", metavar="FILE", help="your training examples: jsonl, csv, tsv, json or parquet"
    )
    group.add_argument("--eval_data", metavar="FILE", help="your examples to evaluate on")
    _add_data_dir_option(group)


def _add_data_dir_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--data_dir",
        metavar="FOLDER",
        help="the tasks' data: official files, or prepared by TFDS (also gs://...)",
    )


def _add_module_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--module", metavar="MODULE", help="imported first, for the tasks that it registers"
    )


def _add_prompt_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="PATH",
        help="a file of a prompt or of what another method tuned, a PEFT adapter, a folder of such "
        "files, or a run of any method for its best ones; repeatable",
    )


_SMALLEST_SHARD = 1e6  # bytes; a model in files of less is a slip of the pen


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text)
    size = float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[found[2]] if found else 0
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 2GB")
    if size < _SMALLEST_SHARD:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1MB")
    return int(size)


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text) or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 0 to 65535")
    return int(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers as in 32,64,128")
    return tuple(map(int, text.split(",")))


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    if not {*modes} <= {"label", "score", "generate"}:
        raise argparse.ArgumentTypeError(f"{text!r}: modes are label, score and generate")
    return modes


def _from_zero(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def mesh_overrides(text: str) -> list[str]:
    """``data=2,model=4`` as overrides of the fields of ``mesh``; UserError for what is not so."""
    overrides = []
    for part in text.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in _MESH_FIELDS or not re.fullmatch(r"-?\d+", size):
            raise UserError(
                f"--mesh {text}: {part!r} is not AXIS=NUMBER; axes are {', '.join(_MESH_FIELDS)}"
            )
        overrides.append(f"mesh.{axis}={size}")
    return overrides
