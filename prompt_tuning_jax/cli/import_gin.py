"""``prompt-tuning import-gin``: a config from the gin files of a launch of T5X."""

from dataclasses import dataclass
from typing import ClassVar

from prompt_tuning_jax.cli.arguments import Command, non_negative, option, positional
from prompt_tuning_jax.cli.console import counted, print_notes
from prompt_tuning_jax.errors import UserError, printable
from prompt_tuning_jax.storage import expanded


@dataclass(frozen=True, kw_only=True)
class ImportGin(Command):
    """Write a config with the meaning of gin files of T5X and google-research/prompt-tuning.

    The files and flags of a launch are read as text: nothing that they name is imported or run.
    The command lists every binding that has another meaning here, or no counterpart.
    """

    name: ClassVar[str] = "import-gin"
    example: ClassVar[str] = (
        "import-gin --gin_file=prompt_tuning/configs/models/t5_1_1_base_prompt.gin "
        "--gin_file=prompt_tuning/configs/runs/prompt_finetune.gin --gin.TRAIN_STEPS=1_150_000 "
        "--gin_search_paths=prompt-tuning,t5x --output config.py"
    )

    file: list[str] = positional("FILE.gin", default=[], many=True)  # gin files, in order
    gin_file: list[str] = option("FILE.gin", default=[])  # the same, as T5X spells it; repeatable
    # Folders to search for gin files and for those that they include: the clones of
    # google-research/prompt-tuning and t5x.
    gin_search_paths: str = option("A,B", default="")
    # Gin binding, also written --gin.NAME=VALUE; repeatable.
    gin_bindings: list[str] = option("NAME=VALUE", default=[])
    tfds_data_dir: str | None = option("FOLDER", default=None)  # sets data.data_dir
    # Step of the checkpoint that training starts from (default: the number in checkpoint_NUMBER).
    restored_step: int | None = option("N", default=None, parse=non_negative)
    output: str = option("FILE.py")  # config to write
    overwrite: bool = False  # replace an existing FILE.py

    def run(self) -> None:
        from prompt_tuning_jax.checkpoints.destination import atomic_write_to, require_free
        from prompt_tuning_jax.config.t5x.config_text import (
            config_text,
            launch_command,
            remarks_by_kind,
        )
        from prompt_tuning_jax.config.t5x.launch import read_launch
        from prompt_tuning_jax.config.t5x.translate import translate, translated_experiment
        from prompt_tuning_jax.config.validation import validate

        files = [*self.file, *self.gin_file]
        if not files and not self.gin_bindings:
            raise UserError("name the gin files of a launch, as FILE.gin or --gin_file=FILE.gin")
        path = expanded(self.output)
        if path.suffix != ".py":
            raise UserError(f"--output {self.output}: a config is a file that ends in .py")
        require_free(path.absolute(), overwrite=self.overwrite, folder=False)
        launch = read_launch(files, self.gin_bindings, self.gin_search_paths.split(","))
        translation = translate(launch, restored_step=self.restored_step)
        if self.tfds_data_dir:
            translation.set("data.data_dir", self.tfds_data_dir, default="--tfds_data_dir")
        experiment = translated_experiment(translation)
        text = config_text(translation, path=str(path), files=files)
        with atomic_write_to(path.absolute(), overwrite=self.overwrite, folder=False) as temporary:
            temporary.write_text(text, encoding="utf-8")
        for heading, remarks in remarks_by_kind(translation):
            print(f"{heading}:")
            for remark in remarks:
                where = f" ({remark.where})" if remark.where else ""
                print(printable(f"  {remark.binding}{where}: {remark.text}"))
        same = translation.same.total()
        translated = sum(map(len, translation.settings.values()))
        print(
            f"{counted(translated, 'field')} set; {counted(same, 'binding')} with the same meaning "
            "and no field"
        )
        print(printable(f"wrote {path}: prompt-tuning {launch_command(translation, str(path))}"))
        try:
            validate(experiment)
        except UserError as error:
            print_notes([f"before you use it: {error}"])
