"""What the demonstration runs, in three sizes."""

import hashlib
import inspect
import json
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from ogpsa_jax.demo import world as world_module
from ogpsa_jax.demo.methods import METHODS
from ogpsa_jax.demo.settings import EASY, FOREIGN, PLENTY, SCARCE, Regime
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
class Comparison:
    """The content of one table.

    Attributes:
      regime: of what general rows there are.
      methods: keys of :data:`~ogpsa_jax.demo.methods.METHODS`.
      dpo: whether DPO follows SFT.
    """

    regime: Regime
    methods: tuple[str, ...] = tuple(METHODS)
    dpo: bool = False


@dataclass(frozen=True)
class Recipe:
    """One size of the demonstration.

    Attributes:
      pretraining: of every world.
      worlds: how many.
      comparisons: made in each; the first is the one of the figure.
    """

    pretraining: Pretraining
    worlds: int
    comparisons: tuple[Comparison, ...]


_QUICK: Final = ("naive", "mixing", "replay", "recommended")
_HEADLINE: Final = ("naive", "mixing", "replay", "recommended", "recommended-replay")

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
        worlds=1,
        comparisons=(Comparison(EASY, _QUICK),),
    ),
    "full": Recipe(
        Pretraining(),
        worlds=1,
        comparisons=(
            Comparison(SCARCE),
            Comparison(PLENTY, _HEADLINE),
            Comparison(FOREIGN, _HEADLINE),
        ),
    ),
    "thorough": Recipe(
        Pretraining(),
        worlds=3,
        comparisons=(
            Comparison(SCARCE, dpo=True),
            Comparison(PLENTY),
            Comparison(FOREIGN),
        ),
    ),
}


def key(*parts: Any) -> str:
    """Eight characters that change with the parts, and with the world's own code."""
    text = json.dumps([_plain(part) for part in parts], sort_keys=True)
    digest = hashlib.blake2b(inspect.getsource(world_module).encode(), digest_size=8)
    digest.update(text.encode())
    return digest.hexdigest()[:8]


def _plain(part: Any) -> Any:
    return asdict(part) if isinstance(part, Pretraining) else part
