"""What the three sizes of the demonstration do."""

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from ogpsa_jax.demo import world as world_module
from ogpsa_jax.demo.methods import (
    LORA_METHOD,
    MIXING_DATA_METHOD,
    MIXING_METHOD,
    NAIVE_METHOD,
    PAPER_METHOD,
    RECOMMENDED_METHOD,
    REPLAY_METHOD,
    REPLAY_PROJECTED_METHOD,
    REPROJECTED_METHOD,
    UPDATE_METHOD,
    Method,
    Stage,
    scarce,
)
from ogpsa_jax.demo.world import FACTS, GENERAL_TASKS, TOKENIZER
from ogpsa_jax.models import DecoderConfig

Mode = Literal["quick", "full", "thorough"]
MATCHED_SAFETY: Final = 0.95


@dataclass(frozen=True)
class Pretraining:
    """How the small model is made.

    Attributes:
      tasks: general tasks of its world.
      facts: how many it knows.
      items: drawn to learn from, which come again as often as need be.
      steps: of the optimizer.
      rows: packed rows a step.
      row_length: tokens of a row.
      learning_rate: its peak.
      width: of the model.
      layers: of the model.
    """

    tasks: tuple[str, ...] = GENERAL_TASKS
    facts: int = FACTS
    items: int = 100_000
    steps: int = 1600
    rows: int = 24
    row_length: int = 48
    learning_rate: float = 4e-3
    width: int = 64
    layers: int = 3

    @property
    def model(self) -> DecoderConfig:
        """The architecture, with 4 heads."""
        return DecoderConfig(
            vocab_size=TOKENIZER.vocab_size,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_layers=self.layers,
            num_heads=4,
            num_kv_heads=4,
            head_dim=self.width // 4,
            tie_word_embeddings=True,
            initializer_range=0.05,
            eos_token_ids=(TOKENIZER.END,),
            pad_token_id=TOKENIZER.PAD,
        )


@dataclass(frozen=True)
class Recipe:
    """One size of the demonstration.

    Attributes:
      pretraining: of every world.
      seeds: (world, alignment) of every repetition.
      stages: SFT, then DPO from its result.
      methods: aligned with in every repetition.
      sft_only: as `methods`, but left out of the DPO stage.
      merge_weights: of the model that naive tuning comes to, merged with that of before.
      probed: methods whose steps are compared with general gradients, in the first repetition.
    """

    pretraining: Pretraining
    seeds: tuple[tuple[int, int], ...]
    stages: tuple[Stage, ...]
    methods: tuple[Method, ...]
    sft_only: tuple[Method, ...] = ()
    merge_weights: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9)
    probed: tuple[Method, ...] = ()

    def runs(self) -> list[tuple[int, int, Method, int]]:
        """(world seed, alignment seed, method, number of stages) of every run, in order."""
        return [
            (world, seed, method, 1 if method in self.sft_only else len(self.stages))
            for world, seed in self.seeds
            for method in (*self.methods, *self.sft_only)
        ]


_SFT: Final = Stage("sft", 16, 110, 4e-4)
_DPO: Final = Stage("dpo", 16, 20, 2e-5)
_HEADLINE: Final = (NAIVE_METHOD, PAPER_METHOD, RECOMMENDED_METHOD, MIXING_METHOD)

RECIPES: Final[dict[Mode, Recipe]] = {
    "quick": Recipe(
        Pretraining(
            tasks=("max", "facts"),
            facts=24,
            items=12_000,
            steps=600,
            rows=16,
            learning_rate=5e-3,
            layers=2,
        ),
        seeds=((0, 0),),
        stages=(replace(_SFT, learning_rate=1e-3),),
        methods=(NAIVE_METHOD, RECOMMENDED_METHOD, MIXING_METHOD),
    ),
    "full": Recipe(
        Pretraining(),
        seeds=((0, 0), (0, 1), (0, 2)),
        stages=(_SFT, _DPO),
        methods=_HEADLINE,
        probed=(NAIVE_METHOD, RECOMMENDED_METHOD),
    ),
    "thorough": Recipe(
        Pretraining(),
        seeds=((0, 0), (1, 1), (2, 2)),
        stages=(_SFT, _DPO),
        methods=(
            *_HEADLINE,
            UPDATE_METHOD,
            LORA_METHOD,
            MIXING_DATA_METHOD,
        ),
        sft_only=(
            scarce(RECOMMENDED_METHOD),
            scarce(MIXING_METHOD),
            scarce(REPLAY_METHOD),
            REPLAY_METHOD,
            REPLAY_PROJECTED_METHOD,
            REPROJECTED_METHOD,
        ),
        probed=(NAIVE_METHOD, PAPER_METHOD, UPDATE_METHOD, RECOMMENDED_METHOD),
    ),
}


def key(*parts: Any) -> str:
    """Eight characters that change with the parts, and with the world's own code."""
    text = json.dumps([_plain(part) for part in parts], sort_keys=True)
    digest = hashlib.blake2b(inspect.getsource(world_module).encode(), digest_size=8)
    digest.update(text.encode())
    return digest.hexdigest()[:8]


def _plain(part: Any) -> Any:
    return part if isinstance(part, str | int | float) else asdict(part)
