"""A run directory: where its files are, what they contain, and which run a model came from.

Training writes these files; evaluation and reporting read them, all through this module.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ogpsa_jax.config import RunConfig, load_config
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json, write_whole
from ogpsa_jax.models.folders import MODEL_CARD
from ogpsa_jax.validation import first_complaint

_SAMPLE = 1 << 20  # bytes of a file that are read at each of three places
_BLOCK = 1 << 24

Count = Annotated[int, Field(ge=0, lt=10**18)]
Measures = dict[str, float]  # by name, as in general/loss


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TrainLoss(_Part):
    """The training loss of the first step, None where its line is lost, and of the last."""

    first: float | None
    last: float


@dataclass(frozen=True)
class Change:
    """How a weighted mean changed between two measurements of the same rows.

    Attributes:
      mean: after less before.
      standard_error: of `mean` over rows; None of a single row.
      rows: how many.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    mean: float
    standard_error: float | None
    rows: Count


class ProjectionFigures(_Part):
    """What the projection did."""

    refreshes: Count
    refused_refreshes: Count | None
    effective_rank: float | None
    mean_removed_fraction: float | None
    reference_coverage: float | None
    least_coverage: float | None


class RowCounts(_Part):
    """What became of the rows of a data set."""

    rows: Count
    tokens: Count
    loss_tokens: Count
    truncated_rows: Count
    cut_prompts: Count
    skipped_rows: Count
    refused_rows: Count
    split_rows: Count = 0
    prompts_alone: Count = 0
    skipped: dict[str, Count] = Field(default_factory=dict, description="rows by reason")
    refused: list[str] = Field(default_factory=list, description="the first of them, by name")


class Rounding(_Part):
    """What the export's precision leaves of a stage.

    Attributes:
      dtype: of the exported weights.
      update_kept: ⟨rounded − start, trained − start⟩ over ‖trained − start‖².
      after: measures of the model as trained.
      rounded: the same of the export.
      kept: (rounded − before) over (after − before), where that is known.
    """

    dtype: str
    update_kept: float
    after: Measures
    rounded: Measures
    kept: Measures


class OwnAnswers(_Part):
    """The initial model's answers to the reference prompts; some end before they are finished."""

    rows: Count
    tokens: Count
    unfinished: Count


class InitialModelUse(_Part):
    """What the run asked of the initial model."""

    initial_model: str
    own_answers: OwnAnswers | None = None
    top_k: Count | None = Field(None, description="tokens kept of each prediction")
    rest_mass: float | None = Field(None, description="mean probability of the other tokens")


class Summary(_Part):
    """What ``summary.json`` contains: what a finished run measured."""

    name: str
    objective: Literal["sft", "dpo"]
    preset: str
    seed: int
    steps: Count
    train_loss: TrainLoss
    before: Measures = Field(description="held-out measures before the first step")
    after: Measures = Field(description="the same after the last")
    change: dict[str, Change] = Field(description="of the loss of each held-out set")
    projection: ProjectionFigures | None = Field(None, description="None without projection")
    training_samples: Count = Field(description="sequences; a pair is two")
    reference_samples: Count = Field(description="sequences of references; a pair is two")
    seconds: float = Field(ge=0, lt=1e18)
    devices: str
    export: str
    data: dict[str, RowCounts]
    references: InitialModelUse | None = None
    rounding: Rounding | None = None
    warnings: list[str]

    def content(self) -> dict[str, Any]:
        """As in the file: parts that the run does not have are left out."""
        return self.model_dump(exclude_defaults=True)

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_whole(path, json.dumps(self.content(), indent=1) + "\n")


@dataclass(frozen=True)
class RunDir:
    """The files of a run, there or not.

    Attributes:
      path: the run directory.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def inputs(self) -> Path:
        """Digests of the data and the model that the run began with."""
        return self.path / "inputs.json"

    @property
    def metrics(self) -> Path:
        """A line for each step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def speed(self) -> Path:
        """How fast the steps were; a resumed run appends."""
        return self.path / "speed.jsonl"

    @property
    def profile(self) -> Path:
        """Traces of ``train.profile``."""
        return self.path / "profile"

    @property
    def checkpoints(self) -> Path:
        """A folder for each saved step."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The trained model as a Hugging Face folder."""
        return self.path / "export"

    @property
    def model_card(self) -> Path:
        """Within the export."""
        return self.export / MODEL_CARD

    @property
    def adapter(self) -> Path:
        """The PEFT adapter of a LoRA run."""
        return self.path / "adapter"

    @property
    def curves(self) -> Path:
        """The picture of the metrics."""
        return self.path / "curves.png"

    @property
    def summary_file(self) -> Path:
        """Written last: its presence says that the run is finished."""
        return self.path / "summary.json"

    def evaluation(self, suite: str) -> Path:
        """Where the results of a suite go."""
        return self.path / "evaluation" / suite

    def evaluations(self) -> list[Path]:
        """The results files of all suites."""
        return sorted(self.path.glob("evaluation/*/results.json"))

    def config(self) -> RunConfig:
        """The resolved configuration.

        Raises:
          InputError: it cannot be read; names the line and the key.
        """
        return load_config(self.config_file)

    def summary(self) -> Summary:
        """The summary.

        Raises:
          InputError: it cannot be read, or another version of this package wrote it.
        """
        remedy = "delete it, and the training command of this run writes it again"
        content = read_json(self.summary_file, remedy)
        try:
            return Summary.model_validate(content)
        except ValidationError as error:
            said = first_complaint(error, Summary)
            raise InputError(
                f"{self.summary_file}: {said} Another version of ogpsa_jax may have written it: "
                f"{remedy}."
            ) from None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      dir: its files.
      config: its settings.
      summary: what it measured.
    """

    dir: RunDir
    config: RunConfig
    summary: Summary

    @property
    def mixes_references(self) -> bool:
        """Whether rows of its reference sets were among the training data."""
        general = {source.path for source in self.config.references.sets}
        return any(source.path in general for source in self.config.data.train)

    @property
    def replays(self) -> bool:
        """Whether it trained on the reference batch of each step."""
        in_step = self.config.references.in_step
        return self.config.projects and in_step is not None and in_step.replay_weight > 0


def run_dir_of(model: str | Path) -> RunDir | None:
    """The directory of the run that a model is the export of; None where it is of no run.

    Args:
      model: a run directory, its ``export``, or anything else.
    """
    path = Path(model)
    with contextlib.suppress(RuntimeError):  # ~ of nobody
        path = path.expanduser()
    for folder in (path, path.parent) if path.name == "export" else (path,):
        if (found := RunDir(folder)).config_file.is_file():
            return found
    return None


def find_run(model: str | Path) -> Run | None:
    """The finished run that a model is the export of; None where there is none.

    Args:
      model: a run directory, its ``export``, or anything else.

    Raises:
      InputError: the run's files cannot be read.
    """
    found = run_dir_of(model)
    if found is None or not found.summary_file.is_file():
        return None
    return Run(found, found.config(), found.summary())


def stages(run: Run) -> list[Run]:
    """The runs that led to a run, the first of them first: each started from the one before."""
    return list(reversed(list(_backwards(run))))


def _backwards(run: Run) -> Iterator[Run]:
    seen: set[Path] = set()
    at: Run | None = run
    while at is not None and at.dir.path.resolve() not in seen:
        seen.add(at.dir.path.resolve())
        yield at
        path = at.config.model.path
        at = None if path is None else find_run(path)


def fingerprint(files: Iterable[Path], *settings: object, sampled: bool = False) -> str:
    """A digest of the names, sizes and content of files, and of settings.

    Args:
      files: in order.
      settings: what else must be the same.
      sampled: read three places of each file alone, which is enough to notice another training of
        a model, and costs seconds where the whole costs minutes.
    """
    found = hashlib.blake2b(repr(settings).encode() if settings else b"", digest_size=20)
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            if sampled:
                for start in (0, size // 2, max(size - _SAMPLE, 0)):
                    file.seek(start)
                    found.update(file.read(_SAMPLE))
                continue
            for block in iter(functools.partial(file.read, _BLOCK), b""):
                found.update(block)
    return found.hexdigest()
