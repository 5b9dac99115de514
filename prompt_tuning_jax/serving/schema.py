"""What goes over the wire, validated: requests, responses, errors; and the limits of a server."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from prompt_tuning_jax.config.serving import Mode

Text = Annotated[str, Field(max_length=100_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
# The columns of a task's template; null is an empty text.
Columns = Annotated[dict[Text, Text | int | Number | bool | None], Field(max_length=1000)]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Options(_Checked):
    """Optional settings of a request."""

    labels: list[Text] | None = Field(
        default=None, min_length=1, max_length=256, description="label: replaces the task's labels"
    )
    targets: list[Text] | None = Field(
        default=None, description="score: the text to score for each input"
    )
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="generate: most tokens, end of sequence included; at most the server's limit",
    )
    min_length: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="generate: fewest tokens, end of sequence included",
    )
    repetition_penalty: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="generate: divides the scores of tokens that were generated before; 1: none",
    )
    no_repeat_ngram_size: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="generate: no sequence of this many tokens is repeated; 0 allows repeats",
    )
    normalize_length: bool | None = Field(
        default=None,
        description="label, score: use the mean log-probability of the tokens instead of the sum; "
        "by default, labels are ranked as when the task's prompts were evaluated",
    )
    stream: bool = Field(
        default=False, description="generate: send server-sent events while the text is generated"
    )
    truncate: bool = Field(
        default=False, description="cut inputs that are too long instead of returning an error"
    )
    raw: bool = Field(
        default=False,
        description="pass inputs to the model unchanged, without the task's template",
    )
    deadline_ms: int | None = Field(
        default=None,
        ge=1,
        le=3_600_000,
        description="give up after this many milliseconds; at most the server's limit",
    )


class PredictRequest(_Checked):
    """Inputs for one or several tasks."""

    task: Text | list[Text] = Field(
        default="",
        description="a task's name, or one for each input; TASK/PROMPT selects one prompt of an "
        "ensemble; empty: the model without a prompt",
    )
    inputs: list[Text | Columns] = Field(
        min_length=1,
        description="texts, which are put into the task's template (inputs_template in /v1/tasks); "
        "objects {column: value} if that has several columns",
    )
    mode: Mode = "label"
    options: Options = Field(default_factory=Options)


class PromptResult(BaseModel):
    """The result of one prompt of a task."""

    prompt: str
    prediction: str | None = None
    probabilities: dict[str, float] | None = Field(default=None, description="of each label")
    log_prob: float | None = Field(
        default=None, description="of the target or of the generated text"
    )
    tokens: int | None = None


class Result(BaseModel):
    """The result for one input; with several prompts, their majority vote."""

    task: str
    prediction: str | None = None
    probabilities: dict[str, float] | None = Field(
        default=None, description="mean over the prompts"
    )
    log_prob: float | None = Field(default=None, description="mean over the prompts")
    votes: dict[str, int] | None = None
    agreement: float | None = Field(
        default=None, description="the share of prompts that agree with the prediction"
    )
    truncated: bool | None = Field(
        default=None, description="true: the input was cut to the longest that the server reads"
    )
    prompts: list[PromptResult]


class PredictResponse(BaseModel):
    """One result for each input, in order."""

    results: list[Result]
    seconds: float = Field(description="from the request's arrival to this response")


class PromptInfo(BaseModel):
    """A prompt, or the parameters of another method, and its metadata."""

    name: str
    method: str = Field(description="its name in a config; prompt_tuning for every plain prompt")
    parameters: int
    length: int | None = Field(default=None, description="positions of a plain prompt")
    seed: int | None = None
    steps: int | None = None
    metric: str | None = None
    score: float | None = None
    trained_on: str | None = None


class TaskInfo(BaseModel):
    """A served task."""

    name: str
    method: str = Field(description="the method of its prompts; several are separated by commas")
    labels: list[str]
    inputs_template: str | None = Field(
        default=None,
        description="the template of the model's input, columns in braces; none: the text itself",
    )
    columns: list[str] | None = Field(
        default=None, description="of inputs_template, if an input is an object with several"
    )
    prompts: list[PromptInfo]


class TaskList(BaseModel):
    """Tasks in the order of their names; pass `next` as `after` to get the following page."""

    model: str
    reads_images: bool = Field(
        default=False, description="inputs are images, which /v1/predict/images takes"
    )
    tasks: list[TaskInfo]
    total: int
    next: str | None = None


class Word(BaseModel):
    """A piece of the vocabulary, and its embedding's cosine similarity to a prompt position."""

    word: str
    cosine: float


class PromptWords(BaseModel):
    """The most similar words of each position of a prompt."""

    prompt: str
    positions: list[list[Word]]


class TaskWords(BaseModel):
    """The nearest words of all prompts of a task."""

    task: str
    prompts: list[PromptWords]


class Status(BaseModel):
    """The state of the server."""

    status: str
    rows_per_second: float
    waiting: int
    compiled: int = Field(
        description="compiled programs, of to_compile; grows while requests are answered"
    )
    to_compile: int
    required_compiled: int = Field(
        description="compiled programs, of those that the server needs to be ready"
    )
    required_to_compile: int


class ErrorBody(BaseModel):
    """What is wrong, and the field of the request in which it is wrong."""

    message: str
    field: str | None = None


class Error(BaseModel):
    """The body of every error response."""

    error: ErrorBody


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest requests that a server accepts, and how long they may take."""

    body_bytes: int = 1_000_000
    images_bytes: int = 33_554_432  # of a request with images
    inputs: int = 128  # in one request
    waiting_rows: int = 1024  # inputs times prompts, of all requests
    wait_seconds: float = 0.002
    deadline_seconds: float = 30.0


class RefusedError(Exception):
    """An error response: an HTTP status, what is wrong, and in which field of the request."""

    def __init__(
        self, status: int, message: str, *, field: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field = status, message, field
        self.retry_after = retry_after
