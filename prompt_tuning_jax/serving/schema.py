"""What goes over the wire: requests as they are checked, answers, errors."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Mode = Literal["label", "generate", "score"]
Text = Annotated[str, Field(max_length=100_000)]
# The columns of a task's template; null is an empty text.
Columns = Annotated[dict[Text, Text | int | bool | None], Field(max_length=1000)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Options(_Checked):
    """What may be said beside the inputs."""

    labels: list[Text] | None = Field(
        default=None, min_length=1, max_length=256, description="label: in place of the task's own"
    )
    targets: list[Text] | None = Field(default=None, description="score: one for each input")
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="generate: most tokens, the end included; the server has a limit",
    )
    min_length: int | None = Field(
        default=None, ge=0, le=1_000_000, description="generate: fewest tokens, the end included"
    )
    repetition_penalty: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="generate: divides the scores of tokens that have been written; 1 is none",
    )
    no_repeat_ngram_size: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="generate: no run of this many tokens is written twice; 0 allows repeats",
    )
    normalize_length: bool | None = Field(
        default=None,
        description="label, score: the mean log-probability of a text's tokens, not their sum",
    )
    stream: bool = Field(default=False, description="generate: server-sent events as it is written")
    truncate: bool = Field(
        default=False, description="cut inputs that are too long, instead of an error"
    )
    raw: bool = Field(
        default=False,
        description="send inputs to the model as they are, without the wording of the task",
    )
    deadline_ms: int | None = Field(
        default=None,
        ge=1,
        le=3_600_000,
        description="give up after so long; the server has a limit",
    )


class PredictRequest(_Checked):
    """Inputs for one task, or for several."""

    task: Text | list[Text] = Field(
        default="",
        description="a task's name, or one for each input; TASK/PROMPT asks one prompt of an "
        "ensemble alone; empty: the model without a prompt",
    )
    inputs: list[Text | Columns] = Field(
        min_length=1,
        description="bare texts, around which the task's wording is put (inputs_template in "
        "/v1/tasks); where that has several columns, objects {column: value}",
    )
    mode: Mode = "label"
    options: Options = Field(default_factory=lambda: Options())


class PromptResult(BaseModel):
    """What one prompt of a task answers."""

    prompt: str
    prediction: str | None = None
    probabilities: dict[str, float] | None = Field(
        default=None, description="over the labels given"
    )
    log_prob: float | None = Field(
        default=None, description="of the target, or of what was written"
    )
    tokens: int | None = None


class Result(BaseModel):
    """The answer for one input; with several prompts, their vote."""

    task: str
    prediction: str | None = None
    probabilities: dict[str, float] | None = Field(
        default=None, description="mean over the prompts"
    )
    log_prob: float | None = Field(default=None, description="mean over the prompts")
    votes: dict[str, int] | None = None
    agreement: float | None = Field(
        default=None, description="share of prompts that predict the same"
    )
    truncated: bool | None = Field(
        default=None, description="true: the input was cut to the tokens that the server reads"
    )
    prompts: list[PromptResult]


class PredictResponse(BaseModel):
    """One result for each input, in order."""

    results: list[Result]
    seconds: float = Field(description="from the request's arrival to this answer")


class PromptInfo(BaseModel):
    """A prompt, or what another method tuned, and what is known about it."""

    name: str
    method: str = Field(description="as a config names it, prompt_tuning for every plain prompt")
    parameters: int
    length: int | None = Field(default=None, description="of a plain prompt, in positions")
    seed: int | None = None
    steps: int | None = None
    metric: str | None = None
    score: float | None = None
    trained_on: str | None = None


class TaskInfo(BaseModel):
    """A task that is served."""

    name: str
    method: str = Field(description="of its prompts, where they differ all, with commas between")
    labels: list[str]
    inputs_template: str | None = Field(
        default=None,
        description="how a text becomes the model's input, columns in braces; none: as it is",
    )
    columns: list[str] | None = Field(
        default=None, description="of inputs_template, where an input is an object of several"
    )
    prompts: list[PromptInfo]


class TaskList(BaseModel):
    """Tasks in the order of their names; ``next`` is where the following page starts."""

    model: str
    tasks: list[TaskInfo]
    total: int
    next: str | None = None


class Word(BaseModel):
    """A piece of the vocabulary, and the cosine of its embedding with a prompt's position."""

    word: str
    cosine: float


class PromptWords(BaseModel):
    """For each position of a prompt the words most like it."""

    prompt: str
    positions: list[list[Word]]


class TaskWords(BaseModel):
    """The nearest words of all prompts of a task."""

    task: str
    prompts: list[PromptWords]


class Status(BaseModel):
    """How the server is doing."""

    status: str
    rows_per_second: float
    waiting: int
    compiled: int = Field(description="programs, of to_compile; also while requests are answered")
    to_compile: int
    required_compiled: int = Field(description="of the programs that it needs to be ready")
    required_to_compile: int


class ErrorBody(BaseModel):
    """What is wrong, and in which field of the request."""

    message: str
    field: str | None = None


class Error(BaseModel):
    """Every answer that is none."""

    error: ErrorBody
