"""``prompt-tuning COMMAND``: from arguments to function calls.

What takes long to import is imported by the command that needs it, so that ``--help`` is at once.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from prompt_tuning_jax.cli.arguments import build_parser, mesh_overrides, rewrite_gin_flags
from prompt_tuning_jax.cli.console import notes_on_stderr
from prompt_tuning_jax.cli.interruption import interruptible
from prompt_tuning_jax.distributed.platforms import leave_out_missing_tpu
from prompt_tuning_jax.errors import UserError, printable, printable_json, printable_lines
from prompt_tuning_jax.untrusted_input import json_text

if TYPE_CHECKING:
    from prompt_tuning_jax.checkpoints.convert_model import Converted
    from prompt_tuning_jax.config.experiment import Experiment

# Options that are short for a field.
_SHORT = {
    "model": "model.name_or_path",
    "data": "data.train",
    "eval_data": "data.eval",
    "data_dir": "data.data_dir",
    "workdir": "training.workdir",
    "seeds": "training.seeds",
    "steps": "training.steps",
    "batch_size": "training.batch_size",
    "learning_rate": "optimizer.learning_rate",
}
# Options that ``convert`` takes as they are.
_CONVERT_OPTIONS = (
    "to",
    "dtype",
    "prompt",
    "step",
    "unscan",
    "vocabulary",
    "relpos_max_distance",
    "max_shard_bytes",
    "model",
    "allow_other_model",
    "overwrite",
)
_MERGE_OPTIONS = ("member", "dtype", "max_shard_bytes", "overwrite")
_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for wrong input, 130 when interrupted."""
    with notes_on_stderr(), interruptible(sys._getframe()) as interruption:
        try:
            return _main(argv)
        except BaseException as error:
            # An import that is interrupted may call it something else.
            if not interruption.came and not isinstance(error, KeyboardInterrupt):
                raise
            interruption.heeded()
            return 130


def _main(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next, and there it ends
        import argcomplete

        argcomplete.autocomplete(build_parser())
    leave_out_missing_tpu()
    try:
        if not argv:
            build_parser().print_help()
            return 0
        args, unknown = build_parser().parse_known_args(rewrite_gin_flags(argv))
        if unknown:
            _refuse_unknown(unknown[0], args.options)
        with _processes(args):
            _COMMANDS[args.command](args)
        sys.stdout.flush()
    except UserError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _processes(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Within, this is one of several processes where flags or surroundings say so."""
    from prompt_tuning_jax.distributed.processes import Processes, several_are_meant, started

    if not hasattr(args, "process_count"):
        if args.command in ("suite", "transfer") and several_are_meant(Processes()):
            raise UserError(f"{args.command} runs in one process; start it once, on one host")
        return nullcontext()
    return started(
        Processes(
            coordinator_address=args.coordinator_address,
            count=args.process_count,
            index=args.process_index,
            silence_seconds=float(args.process_timeout),
        )
    )


def _train(args: argparse.Namespace) -> None:
    experiment = _experiment(args)
    _require_typed_files(args, experiment)
    from prompt_tuning_jax.training.run import needs_pretraining, train

    if needs_pretraining(experiment):
        from prompt_tuning_jax.pretraining.run import pretrain as train
    result = train(experiment)
    if not result.finished:
        sys.exit(128 + result.stopped_by)  # as a shell reports a program that a signal has ended


def _eval(args: argparse.Namespace) -> None:
    _require_folder(args, "output", "predictions")
    if args.data and not args.eval_data and not args.split:
        raise UserError(
            "--data is the training file, for its labels; name the examples to evaluate on with "
            "--eval_data"
        )
    experiment = _experiment(args)
    from prompt_tuning_jax.distributed.processes import is_primary
    from prompt_tuning_jax.inference.evaluation import evaluate, prediction_rows
    from prompt_tuning_jax.inference.prediction_files import evaluated_text, form_of
    from prompt_tuning_jax.inference.score_table import print_scores, scores_as_dict

    labels = experiment.data.labels if _is_set(args, "data.labels") else ()
    result = evaluate(experiment, prompts=args.prompt, split=args.split, labels=labels)
    if not is_primary():
        return
    for line in result.reports:
        print(printable(line))
    print_scores(result)
    if args.output:
        _write(args.output, json_text(scores_as_dict(result), indent=2) + "\n")
        print(f"wrote the scores to {args.output}", file=sys.stderr)
    if args.predictions:
        rows = list(prediction_rows(result))
        form = form_of(args.predictions) or "jsonl"
        _write(args.predictions, evaluated_text(rows, form))
        print(f"wrote {_counted(len(rows), 'prediction')} to {args.predictions}", file=sys.stderr)


def _predict(args: argparse.Namespace) -> None:
    _require_folder(args, "output")
    inputs = _inputs(args)
    from prompt_tuning_jax.distributed.processes import is_primary
    from prompt_tuning_jax.inference.prediction import UNDESCRIBED, predict
    from prompt_tuning_jax.inference.prediction_files import form_of, predictions_text

    form = form_of(args.output) if args.output else None
    if args.json and form in ("csv", "tsv"):
        raise UserError(
            f"--json writes JSON lines, and --output {args.output} names a table; leave out one"
        )
    default = UNDESCRIBED if args.prompt or args.model else None
    experiment = _experiment(args, default)
    predictions = predict(
        experiment,
        inputs=inputs,
        prompts=args.prompt,
        labels=experiment.data.labels if _is_set(args, "data.labels") else (),
        task=args.task or (experiment.data.task if _is_set(args, "data.task") else ""),
        raw=args.raw,
    )
    if not is_primary():
        return
    form = "jsonl" if args.json else form
    if form is None:
        output = "".join(" ".join(one.prediction.splitlines()) + "\n" for one in predictions)
    else:
        given = [] if isinstance(inputs, Path) else inputs
        output = predictions_text(given, predictions, form)
    if args.output:
        _write(args.output, output)
        number = _counted(len(predictions), "prediction")
        print(f"wrote {number} to {args.output}", file=sys.stderr)
    else:
        sys.stdout.write(printable_json(output) if args.json else printable_lines(output))


def _is_set(args: argparse.Namespace, field: str) -> bool:
    """Whether the user has said a field with ``--set``."""
    return any(override.partition("=")[0].strip() == field for override in args.set)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _suite(args: argparse.Namespace) -> None:
    experiment = _experiment_of_many(args)
    from prompt_tuning_jax.studies.runs import suite

    result = suite(
        experiment,
        args.name,
        tasks=_names(args.tasks),
        form=args.form,
        split_validation=_names(args.split_validation),
    )
    if result.stopped_by:
        sys.exit(128 + result.stopped_by)


def _transfer(args: argparse.Namespace) -> None:
    experiment = _experiment_of_many(args)
    from prompt_tuning_jax.config.overrides import apply_overrides
    from prompt_tuning_jax.studies.runs import try_transfer

    result = try_transfer(
        experiment,
        args.source,
        _names(args.targets),
        methods=_names(args.methods),
        model_tuning=lambda of: apply_overrides(of, args.model_set),
        form=args.form,
    )
    if result.stopped_by:
        sys.exit(128 + result.stopped_by)


def _experiment_of_many(args: argparse.Namespace) -> "Experiment":
    """The experiment that is done for each task: with five seeds unless the user names some."""
    from prompt_tuning_jax.studies.suite import OWN_FIELDS

    fields = [override.partition("=")[0].strip() for override in args.set]
    for field in fields:
        if field in OWN_FIELDS:
            raise UserError(f"--set {field}: each task brings its own")
    experiment = _experiment(args)
    if args.seeds is not None or "training.seeds" in fields:
        return experiment
    from prompt_tuning_jax.studies.runs import with_seeds

    return with_seeds(experiment)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _plan(args: argparse.Namespace) -> None:
    experiment = _experiment(args)
    from prompt_tuning_jax.planning.report import plan_as_dict, plan_lines, plan_run

    options = {name: getattr(args, name) for name in ("topology", "chips", "kind", "tries")}
    given = {name: value for name, value in options.items() if value is not None}
    made = plan_run(
        experiment, own_mesh=args.mesh is not None, evaluate=not args.train_only, **given
    )
    if args.json:
        print(json_text(plan_as_dict(made), indent=2))
        return
    for line in plan_lines(made):
        print(line)


def _tasks(args: argparse.Namespace) -> None:
    _require_folder(args, "dump")
    from prompt_tuning_jax.cli.tasks import dump, examples, tasks

    _import_module(args.module)
    options = {name: getattr(args, name) for name in ("model", "vocabulary", "data_dir")}
    given = {name: value for name, value in options.items() if value}
    if args.name is None:
        for option in ("model", "vocabulary", "split", "limit", "dump"):
            if getattr(args, option):
                raise UserError(f"--{option} needs the NAME of a task")
        listed = {"data_dir": args.data_dir} if args.data_dir else {}
        rows = list(tasks(**listed, every=True) if args.all else tasks(**listed))
        width = max((len(name) for name, what in rows if what is not None), default=0)
        for number, (name, what) in enumerate(rows):
            if what is None:  # a heading
                print(f"\n{name}" if number else name)
            else:
                print(f"{name:{width}}  {what}".rstrip())
        return
    if args.dump:
        number = dump(args.name, args.dump, split=args.split or "train", **given)
        print(f"wrote {number:,} examples to {args.dump}")
        return
    limit = args.limit or 5
    for example in examples(args.name, split=args.split or "train", limit=limit, **given):
        for name, value in example.items():
            print(f"{name}: {printable(str(value))}")
        print()


def _init(args: argparse.Namespace) -> None:
    from prompt_tuning_jax.cli.init import examples_with_titles, init

    if args.name is None:
        if args.output or args.overwrite:
            raise UserError("say which example: prompt-tuning init lists them")
        rows = list(examples_with_titles())
        width = max(len(name) for name, _ in rows)
        for name, title in rows:
            print(f"{name:{width}}  {title}")
        return
    path = init(args.name, args.output or "", overwrite=args.overwrite)
    print(printable(f"wrote {path}"))


def _completion(args: argparse.Namespace) -> None:
    from argcomplete.shell_integration import shellcode

    print(shellcode(["prompt-tuning"], shell=args.shell))


def _serve(args: argparse.Namespace) -> None:
    from prompt_tuning_jax.serving.launch import Serving, default_experiment, serve

    if not Path(args.prompts).exists():
        raise UserError(f"--prompts {args.prompts}: no such folder")
    from prompt_tuning_jax.compilation import keep_compiled_programs
    from prompt_tuning_jax.config.no_effect import require_effect
    from prompt_tuning_jax.config.overrides import apply_overrides
    from prompt_tuning_jax.config.validation import validate
    from prompt_tuning_jax.serving.malloc_trim import keep_freed_memory

    keep_freed_memory()
    keep_compiled_programs()
    overrides = [f"model.name_or_path={args.model}"] if args.model else []
    overrides += mesh_overrides(args.mesh) if args.mesh else []
    experiment = default_experiment(args.prompts)
    experiment = validate(apply_overrides(experiment, [*overrides, *args.set]))
    require_effect(_given(args), experiment, command="serve")
    _import_module(experiment.data.module)  # named here: a run's is not in default_experiment
    names = [field.name for field in dataclasses.fields(Serving)]
    given = {name: v for name in names if (v := getattr(args, name)) is not None}
    serving = Serving(**given)
    if serve(experiment, args.prompts, host=args.host, port=args.port, serving=serving):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # what is being compiled would be waited for, or fail as its libraries go


def _metrics(args: argparse.Namespace) -> None:
    _require_folder(args, "leaderboard")
    from prompt_tuning_jax.inference.scoring import metrics

    _import_module(args.module)
    options = {name: getattr(args, name) for name in ("data_dir", "leaderboard")}
    given = {name: value for name, value in options.items() if value}
    scored = metrics(args.name, args.predictions, split=args.split, **given)
    for note in scored.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    if scored.scores is not None:
        # A correlation with a constant is nan, which is null in JSON.
        print(json_text(scored.scores, indent=2))


def _import_module(name: str | None) -> None:
    """Imports the module that the command line names, if it names one."""
    if name:
        from prompt_tuning_jax.data.tasks.selection import import_module

        import_module(name)


def _inspect(args: argparse.Namespace) -> None:
    from prompt_tuning_jax.inference.inspection import describe, inspect

    options = {"with_fingerprint": True} if args.fingerprint else {}
    if args.json:
        described = describe(args.path, **options)
        _print_json(described)
        return
    rows = [(printable(field), value) for field, value in inspect(args.path, **options)]
    width = max((len(field) for field, _ in rows), default=0)
    for field, value in rows:
        print(f"{field:{width}}  {printable(str(value))}")


def _convert(args: argparse.Namespace) -> None:
    from prompt_tuning_jax.inference.conversion import convert

    options = {name: getattr(args, name) for name in _CONVERT_OPTIONS}
    given = {name: v for name, v in options.items() if v is not None and v is not False}
    _print_written(convert(args.source, args.destination, **given))


def _merge(args: argparse.Namespace) -> None:
    from prompt_tuning_jax.inference.export import merge

    given = {name: v for name in _MERGE_OPTIONS if (v := getattr(args, name))}
    _print_written(merge(args.source, args.destination, **given))


def _similar(args: argparse.Namespace) -> None:
    from prompt_tuning_jax.analysis.similarity import similar

    found = similar(
        args.source,
        args.among,
        by=args.by,
        top=args.top or 0,
        output=args.output or "",
        overwrite=args.overwrite,
    )
    if args.json:
        _print_json([vars(each) for each in found])
    else:
        for each in found:
            line = f"{each.similarity:7.4f}  {each.path}{f'  {each.task}' * bool(each.task)}"
            print(printable(line))
    if args.output:
        number = args.top or 1
        what = "the nearest prompt" if number == 1 else f"a mixture of the nearest {len(found)}"
        print(
            f"wrote {what} to {args.output}; method.init=file method.init_path={args.output} "
            "starts from it",
            file=sys.stderr,
        )


def _recycle(args: argparse.Namespace) -> None:
    from prompt_tuning_jax.analysis.recycle import recycle
    from prompt_tuning_jax.analysis.recycling import Fit

    options = {name: getattr(args, name) for name in ("by", "terms", "steps", "seed")}
    given = {name: value for name, value in options.items() if value is not None}
    for name, of in (("terms", "combination"), ("steps", "mlp"), ("seed", "mlp")):
        if name in given and args.by != of:
            raise UserError(f"--{name} only goes with --by {of}")
    done = recycle(
        args.source,
        source=args.from_model,
        target=args.to_model,
        output=args.output,
        fit=Fit(**given),
        pieces=args.pieces or 0,
        allow_other_model=args.allow_other_model,
        overwrite=args.overwrite,
    )
    if args.json:
        _print_json(vars(done))
    else:
        print(
            f"{done.by}, fitted on the embeddings of {done.pieces:,} pieces: relative error "
            f"{done.error:.3f}, on pieces left out {done.held_out_error:.3f}"
        )
        if done.prompt_error is not None:
            print(f"the combinations miss {done.prompt_error:.3f} of the prompts themselves")
        for path in done.paths:
            print(printable(f"wrote {path}"))
    for note in done.notes:
        print(printable(f"note: {note}"), file=sys.stderr)


def _print_written(done: "Converted") -> None:
    files = f" in {done.files} files" if done.files > 1 else ""
    where = _written_to(done.path)
    print(printable(f"wrote {done.what}: {where} ({_readable(done.bytes)}{files})"))
    for note in done.notes:
        print(printable(f"note: {note}"), file=sys.stderr)


def _written_to(path: Path) -> str:
    """The file or folder; in a folder of several prompts or adapters, each of them."""
    adapters = sorted(p.parent for p in path.glob("*/adapter_config.json"))
    first, *others = adapters or sorted(path.glob("*.npy")) or [path]
    return ", ".join([str(first), *(other.name for other in others)])


def _print_json(value: object) -> None:
    print(printable_json(json_text(value, indent=2)))


def _readable(size: int) -> str:
    """A number of bytes as people say it."""
    unit, name = next(((u, n) for u, n in _UNITS if size >= u), (1, "bytes"))
    return f"{size} bytes" if unit == 1 else f"{size / unit:.3g} {name}"


def _experiment(args: argparse.Namespace, default: "Experiment | None" = None) -> "Experiment":
    """The experiment that the arguments name, with the short options and ``--set`` applied.

    ``default`` is for prompts that no run and no config says anything about; it may have no task.
    """
    from prompt_tuning_jax.compilation import keep_compiled_programs
    from prompt_tuning_jax.config.config_file import load_config, run_config
    from prompt_tuning_jax.config.no_effect import require_effect
    from prompt_tuning_jax.config.overrides import apply_overrides
    from prompt_tuning_jax.config.validation import validate

    keep_compiled_programs()
    prompts = getattr(args, "prompt", [])
    for path in prompts:
        if not Path(path).exists():
            raise UserError(f"--prompt {path}: no such file or folder")
    gin = bool(args.gin_file or args.gin_bindings)
    if args.config and gin:
        raise UserError(f"give either {args.config} or gin files and bindings, not both")
    short = {
        field: value
        for name, field in _SHORT.items()
        if (value := getattr(args, name, None)) is not None
    }
    given = _given(args)

    if args.config:
        experiment = load_config(args.config)
    elif gin:
        from prompt_tuning_jax.config.gin import experiment_from_gin

        experiment = experiment_from_gin(
            args.gin_file, args.gin_bindings, args.gin_search_paths.split(",")
        )
    elif (saved := next((e for p in prompts if (e := run_config(p))), None)) is not None:
        experiment = saved
    elif any(field in given for field in ("data.train", "data.eval")):
        from prompt_tuning_jax.cli.init import own_data_experiment

        experiment = own_data_experiment()
    elif default is not None:
        experiment = default
    else:
        run = ", or the --prompt of a run" if "prompt" in args else ""
        for prompt in prompts[:1]:
            run += (
                f": {prompt} does not say what to do with it; for instance prompt-tuning "
                f"{args.command} --prompt {prompt} --eval_data FILE.jsonl"
            )
        own = ", or --data and --eval_data FILE.jsonl of your own" if "data" in args else ""
        raise UserError(
            f"no config; give CONFIG.py (prompt-tuning init lists examples) or --gin_file=FILE.gin"
            f"{own}{run}"
        )

    overrides = [f"{field}={value}" for field, value in short.items()]
    if (mesh := getattr(args, "mesh", None)) is not None:
        overrides += mesh_overrides(mesh)
    undescribed = experiment is default
    experiment = apply_overrides(experiment, [*overrides, *args.set])
    if not undescribed or experiment.data.task or experiment.data.train:
        experiment = validate(experiment)  # else whoever takes it validates the rest
    require_effect(
        given,
        experiment,
        command=args.command,
        prompts=len(prompts),
        bare_prompts=any(run_config(prompt) is None for prompt in prompts),
    )
    return experiment


def _given(args: argparse.Namespace) -> dict[str, str]:
    """The fields that the command line sets, and how."""
    options = {
        field: f"--{name}"
        for name, field in _SHORT.items()
        if getattr(args, name, None) is not None
    }
    named = (override.partition("=")[0].strip() for override in args.set)
    return {**options, **{field: f"--set {field}" for field in named}}


def _inputs(args: argparse.Namespace) -> list[str] | Path:
    """Texts, or the path of a data file."""
    if args.text and args.input:
        raise UserError("give either TEXT or --input, not both")
    if args.text:
        return list(args.text)
    if args.input is None and sys.stdin.isatty():
        raise UserError("no input: give TEXT, --input FILE, or lines on stdin")
    if args.input:
        from prompt_tuning_jax.data.tasks.row_files import is_row_file

        if is_row_file(Path(args.input)):
            return Path(args.input)
    try:
        text = Path(args.input).read_text(encoding="utf-8") if args.input else sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the input {args.input or 'from stdin'}: {why}") from None
    if not text.strip():
        raise UserError(f"the input {args.input or 'from stdin'} is empty")
    return text.removesuffix("\n").split("\n")


def _require_typed_files(args: argparse.Namespace, experiment: "Experiment") -> None:
    """UserError where a config's own example of a file is not there: the user never named it."""
    data = experiment.data
    typed = {override.partition("=")[0].strip() for override in args.set}
    for option, field, path in (
        ("data", "data.train", data.train),
        ("eval_data", "data.eval", data.eval),
    ):
        named = getattr(args, option) is not None or field in typed
        if path and not named and not Path(path).exists():
            raise UserError(
                f"--{option} is missing: name your examples to "
                f"{'train' if option == 'data' else 'evaluate'} on (of the config's own example, "
                f"{path}: there is no such file)"
            )


def _require_folder(args: argparse.Namespace, *options: str) -> None:
    """Raises UserError if a file that is to be written has no folder; before the work is done."""
    for option in options:
        path = getattr(args, option)
        if path and not Path(path).parent.is_dir():
            raise UserError(f"--{option} {path}: there is no folder {Path(path).parent}")


def _write(name: str, text: str) -> None:
    from prompt_tuning_jax.storage import atomic_write

    path = Path(name)
    if path.exists() and not path.is_file():  # /dev/stdout is written to, never replaced
        path.write_text(text, encoding="utf-8")
        return
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def _refuse_unknown(arg: str, options: Sequence[str]) -> NoReturn:
    from prompt_tuning_jax.errors import suggest

    name = arg.partition("=")[0]
    known = [option for option in options if option.startswith("--")]
    near = suggest(name, known) if name.startswith("-") else "quote a text that has spaces"
    raise UserError(f"unknown argument {name!r}: {near}")


_COMMANDS = {
    "train": _train,
    "eval": _eval,
    "predict": _predict,
    "init": _init,
    "completion": _completion,
    "tasks": _tasks,
    "metrics": _metrics,
    "plan": _plan,
    "inspect": _inspect,
    "convert": _convert,
    "merge": _merge,
    "similar": _similar,
    "recycle": _recycle,
    "suite": _suite,
    "transfer": _transfer,
    "serve": _serve,
}
