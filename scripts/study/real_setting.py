"""The real small model of the study: its data, and one trial on them.

stories260k, a Llama that writes stories, learns the beginnings of safe answers to harmful requests.
References are stories that it wrote itself (its own words), or general questions with ChatGPT's
answers (foreign ones). OGPSA_DATA names the folder that contains data/; default ../shared.
"""

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from loop import Compute, Trial, learn, merge, predictions_kl

from ogpsa_jax.data import (
    ChatTemplate,
    DataSource,
    Example,
    fixed_batches,
    load_tokenizer,
    prepare,
)
from ogpsa_jax.models import load_pretrained
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.step import Network

SCORES = SAFETY, STORIES, DRIFT = ("safety/loss", "stories/loss", "halueval/kl")
"""Held out: loss of safe answers and of stories, and KL(initial model ‖ now) of the tokens of
general answers; nats a token."""

_FILES = {
    "safety": "safety_tuned_llamas/safety_only_data_Instructions.json",
    "stories": "models/stories260k/generated_stories.jsonl",
    "halueval": "halueval/general_data.json",
}


@dataclass(frozen=True)
class Sizes:
    """How much is trained and scored.

    Attributes:
      compute: of a trial; rows longer than its length are cut at the end.
      peak: learning rate that a trial's is relative to.
      references: general rows.
      scored: held-out rows of each kind of text.
      story: tokens of a scored piece of a story; longer than any row that is trained on.
    """

    compute: Compute
    peak: float
    references: int
    scored: int
    story: int


SIZES = Sizes(
    Compute(batch=8, sequences=800, length=64), peak=5e-4, references=80, scored=64, story=192
)


class Setting:
    """The model and one draw of its data."""

    def __init__(self, seed: int, half: int, sizes: Sizes = SIZES) -> None:
        """Draw rows.

        Args:
          seed: of the draw, and of the order of training.
          half: 0: all rows are from one half of each file; 1: from the other.
          sizes: what is drawn, and what a trial may spend.
        """
        self.seed, self.sizes = seed, sizes
        self.start = _model()
        length, scored = sizes.compute.length, sizes.scored
        random = np.random.default_rng(seed)

        def drawn(rows: list[Example], count: int | None = None) -> list[Example]:
            rows = rows[half::2]
            return [rows[i] for i in random.permutation(len(rows))[:count]]

        safety = drawn(_rows("safety", "train", length))
        general = drawn(_rows("halueval", "train", length))
        held_out, self.safe = safety[:scored], safety[scored:]
        # Whole stories are held out, not pieces of them.
        self.references = {
            "own": drawn(_rows("stories", "train[:400]", length), sizes.references),
            "foreign": general[scored:][: sizes.references],
        }
        stories = drawn(_rows("stories", "train[400:]", sizes.story), scored // 2)
        self._scored = (
            _whole(held_out, length),
            _whole(stories, sizes.story),
            _whole(general[:scored], length),
        )
        self._teacher = _predictions(self.start, self._scored[2])
        self._naive: dict[float, Network] = {}
        self.before = self._scores(self.start)

    def run(self, trial: Trial, case: str) -> dict[str, float]:
        """Train and score."""
        if trial.merged < 1.0:
            done = self._trained(replace(trial, method="naive", merged=1.0), case)
            return self._scores(merge(self.start, done, trial.merged))
        return self._scores(self._trained(trial, case))

    def _trained(self, trial: Trial, case: str) -> Network:
        if trial.method == "naive" and trial.rate in self._naive:
            return self._naive[trial.rate]
        network = learn(
            self.start,
            trial,
            self.safe,
            self.references[case],
            peak=self.sizes.peak * trial.rate,
            seed=self.seed,
            compute=self.sizes.compute,
        )
        if trial.method == "naive":
            self._naive[trial.rate] = network
        return network

    def _scores(self, network: Network) -> dict[str, float]:
        found = _measure(
            network.graphdef, (network.trained, network.frozen), self._scored, self._teacher
        )
        return dict(zip(SCORES, map(float, found), strict=True))


def data() -> Path:
    """Where the data are."""
    return Path(os.environ.get("OGPSA_DATA", "../shared")) / "data"


@lru_cache
def _model() -> Network:
    return Network.of(load_pretrained(data() / "models/stories260k", dtype="float32"))


@lru_cache
def _rows(name: str, split: str, length: int) -> list[Example]:
    template = ChatTemplate(load_tokenizer(data() / "models/stories260k"), "vanilla")
    source = DataSource(str(data() / _FILES[name]), split)
    # Requests that leave an answer no room are left out; nothing else is.
    return prepare([source], template, kind="sft", max_length=length, too_long="skip")[0]


def _whole(rows: list[Example], width: int) -> dict[str, Any]:
    """Arrays ``[rows, width]``."""
    arrays = fixed_batches(rows, batch_size=len(rows), max_length=width)
    return {name: array[0] for name, array in arrays.items()}


@jax.jit
def _log_probs(graphdef: Any, params: Any, batch: Any) -> jax.Array:
    model = nnx.merge(graphdef, *params)
    logits = model(batch["input_ids"], batch["positions"], batch["segment_ids"])
    return jax.nn.log_softmax(logits)


def _predictions(network: Network, batch: Any) -> jax.Array:
    return _log_probs(network.graphdef, (network.trained, network.frozen), batch)


@jax.jit
def _measure(graphdef: Any, params: Any, scored: Any, teacher: jax.Array) -> list[jax.Array]:
    model = nnx.merge(graphdef, *params)
    losses = []
    for batch in scored[:2]:
        total, count, _ = sft_loss(model, batch, chunk_size=batch["input_ids"].shape[-1])
        losses.append(total / count)
    return [*losses, predictions_kl(model, scored[2], teacher)]
