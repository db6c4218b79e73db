"""A suite: which tasks a model is scored on. One strict schema, read from YAML."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import expand_environment, line_of, read_yaml
from ogpsa_jax.validation import first_complaint, first_detail, plain_location

Score = Literal["safety", "over_refusal", "general"]


def _pattern(value: str) -> str:
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from error
    if groups > 1:
        raise ValueError("a regular expression with at most one group")
    return value


Seed = Annotated[int, Field(ge=0, lt=2**31)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Task(_Section):
    name: str = Field(
        pattern=r"^[\w.+-]+$", description="in results; letters, digits, and any of _ . + -"
    )
    path: str = Field(
        description="csv, json, jsonl or txt file; from the suite's folder, else from this one"
    )
    limit: PositiveInt | None = Field(None, description="score this many items, drawn by the seed")
    seed: Seed | None = Field(None, description="of draws and sampling; null: the suite's")
    where: dict[str, str] = Field(
        default_factory=dict, description="keep the rows whose fields have these values"
    )


class _Generation(_Task):
    prompt: str | None = Field(
        None, description="text with {field} for a row's fields; null: the first known field"
    )
    chat: bool | None = Field(
        None, description="prompts are a user's turn; null: where the model has a chat template"
    )
    max_new_tokens: PositiveInt = Field(128, description="of an answer, at most")
    temperature: FiniteFloat = Field(0.0, ge=0, description="0: the likeliest token")


class RefusalTask(_Generation):
    """How often harmful requests are refused: the safety score.

    Of a file in the layout of XSTest (a column ``label``, or ``type`` with ``contrast_`` before the
    unsafe ones), the unsafe requests alone are taken.
    """

    kind: Literal["refusal"]
    score: Literal["safety"] | None = Field("safety", description="what it counts towards")
    judge: bool = Field(False, description="the suite's judge decides instead of the rules")


class OverRefusalTask(_Generation):
    """How often harmless requests are refused; of a file in XSTest's layout, the safe ones."""

    kind: Literal["over_refusal"]
    score: Literal["over_refusal"] | None = Field("over_refusal", description="as above")
    judge: bool = Field(False, description="as above")


class ExactMatchTask(_Generation):
    """How often the answer is the expected one, after both are normalised.

    Normalised: lower case, no thousands separators, no full stop or white space around.
    """

    kind: Literal["exact_match"]
    answer: str = Field("{answer}", description="the expected answer, with {field} for fields")
    extract: Pattern | None = Field(
        None, description="regular expression; its last match in the model's answer is compared"
    )
    extract_expected: Pattern | None = Field(
        None, description="the same for the expected answer, as in '#### (.*)'"
    )
    max_new_tokens: PositiveInt = Field(256, description="of an answer, at most")
    score: Literal["general"] | None = Field("general", description="what it counts towards")


class MultipleChoiceTask(_Task):
    """How often the likeliest choice is the right one."""

    kind: Literal["multiple_choice"]
    prompt: str = Field(description="text with {field} for a row's fields")
    chat: bool | None = Field(
        None, description="prompts are a user's turn; null: where the model has a chat template"
    )
    choices: str | tuple[str, ...] = Field(
        "choices", description="field that lists them, or the choices, with {field} for fields"
    )
    answer: str = Field("answer", description="field: number from 0, letter, or the choice itself")
    separator: str = Field(" ", description="between prompt and choice; none in a conversation")
    normalise: Literal["none", "characters", "tokens"] = Field(
        "none", description="divide each log-likelihood by the choice's length in these"
    )
    score: Literal["general"] | None = Field("general", description="what it counts towards")


class GreedyMatchTask(_Task):
    """How often greedy decoding would begin with exactly the expected answer, token for token.

    One forward pass decides it. An answer that closes with the text of the token that ends a turn
    must end there.
    """

    kind: Literal["greedy_match"]
    prompt: str | None = Field(
        None, description="text with {field} for a row's fields; null: the first known field"
    )
    chat: bool | None = Field(
        None, description="prompts are a user's turn; null: where the model has a chat template"
    )
    answer: str = Field("{answer}", description="the expected answer, with {field} for fields")
    separator: str = Field(" ", description="between prompt and answer; none in a conversation")
    score: Literal["general"] | None = Field("general", description="what it counts towards")


class PerplexityTask(_Task):
    """How well texts are predicted: nats per token, perplexity, bits per byte.

    Its score, where it has one, is 1 / perplexity: the (geometric) mean probability of a token.
    """

    kind: Literal["perplexity"]
    text: str = Field("{text}", description="the text, with {field} for a row's fields")
    separator: str | None = Field(
        None, min_length=1, description="what stands between the documents of a txt file"
    )
    score: Literal["general"] | None = Field(None, description="what it counts towards")


Task = Annotated[
    RefusalTask
    | OverRefusalTask
    | ExactMatchTask
    | MultipleChoiceTask
    | GreedyMatchTask
    | PerplexityTask,
    Field(discriminator="kind"),
]


class JudgeSettings(_Section):
    """An OpenAI-compatible endpoint that classifies answers."""

    base_url: str = Field(description="as in https://api.openai.com/v1; no key in it")
    model: str = Field(description="the judge's name there")
    api_key_env: str | None = Field(
        "OPENAI_API_KEY", description="environment variable that has the key; null: none needed"
    )
    concurrency: PositiveInt = Field(4, description="requests under way at a time")
    timeout: FiniteFloat = Field(
        60.0, gt=0, description="seconds a request may take, its reply included"
    )
    attempts: PositiveInt = Field(6, description="how often a request is tried")
    temperature: FiniteFloat | None = Field(0.0, ge=0, description="null: not sent")
    max_tokens: PositiveInt | None = Field(
        None, description="of the judge's reply; null: 512, or not sent with the next key"
    )
    max_completion_tokens: PositiveInt | None = Field(
        None, description="the same for models that think, thoughts included"
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description="further fields of a request, as in {reasoning_effort: low}",
    )

    @model_validator(mode="after")
    def _no_secret(self) -> "JudgeSettings":
        if not re.fullmatch(r"https?://[^@?#\s]+", self.base_url):
            raise ValueError(
                "base_url must be an http(s) address without user, query or fragment; keys come "
                "from the environment"
            )
        try:
            parts = urlsplit(self.base_url)
            host, _ = (parts.hostname or "").encode("idna"), parts.port
        except ValueError as error:
            raise ValueError(f"base_url is not an address ({error})") from error
        if not host:
            raise ValueError("base_url names no host")
        own = {*JudgeSettings.model_fields, "messages", "stream"} & self.extra_body.keys()
        if own:
            raise ValueError(f"extra_body must not contain {min(own)}; set it beside extra_body")
        return self

    def fields(self) -> dict[str, Any]:
        """What a request contains besides model and messages."""
        shortest = 512 if self.max_completion_tokens is None else None
        sent = {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens or shortest,
            "max_completion_tokens": self.max_completion_tokens,
        }
        return {name: value for name, value in sent.items() if value is not None} | self.extra_body


class Suite(_Section):
    """Which tasks a model is scored on."""

    name: str = Field(pattern=r"^[\w+-][\w.+-]*$", description="names the folder of the results")
    seed: Seed = Field(0, description="of draws and sampling")
    tasks: tuple[Task, ...] = Field(min_length=1, description="what is scored")
    judge: JudgeSettings | None = Field(None, description="for tasks with `judge: true`")

    @model_validator(mode="after")
    def _consistent(self) -> "Suite":
        names = [task.name for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"two tasks are named {twice}; names must differ")
        judged = [task.name for task in self.tasks if getattr(task, "judge", False)]
        if judged and self.judge is None:
            raise ValueError(f"task {judged[0]} asks for a judge, but the suite has no `judge`")
        return self


def load_suite(path: str | Path, judge: Mapping[str, Any] | None = None) -> Suite:
    """Read a suite; paths in it become absolute, ``${NAME:-default}`` comes from the environment.

    Args:
      path: YAML file.
      judge: settings that take the place of those under the file's ``judge``.

    Raises:
      InputError: unreadable, an unknown key, a wrong value or a missing file; names file, line, key
        and remedy.
    """
    path = Path(path)
    raw, root = read_yaml(path, "suite")
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected the keys `name` and `tasks`.")
    try:
        expanded = expand_environment(raw, path)
        if judge:
            expanded = {**expanded, "judge": {**(expanded.get("judge") or {}), **judge}}
        suite = Suite.model_validate(expanded)
    except ValidationError as error:
        line = line_of(root, plain_location(Suite, first_detail(error)))
        where = f"{path}, line {line}" if line else str(path)
        said = first_complaint(error, Suite)
        raise InputError(f"{where}: {said}") from error
    tasks = []
    for task in suite.tasks:
        beside = path.parent / task.path
        file = beside if beside.exists() else Path(task.path)
        if not file.is_file():
            raise InputError(
                f"{path}: task {task.name}: no such file {task.path}, neither in {path.parent} nor "
                "in the current folder; correct `path`."
            )
        tasks.append(task.model_copy(update={"path": str(file.resolve())}))
    return suite.model_copy(update={"tasks": tuple(tasks)})
