"""The settings of each method in each regime: one literal table, chosen by ``scripts/study``."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Regime:
    """How many general rows there are, and whose words their answers are in.

    Attributes:
      rows: as references, for replay, or to be mixed in.
      foreign: their answers are right, but not in the model's own form.
      rate: of learning, relative to the demonstration's, for every method.
    """

    rows: int
    foreign: bool = False
    rate: float = 1.0

    @property
    def name(self) -> str:
        """For labels."""
        return f"{self.rows} {'foreign ' * self.foreign}rows"

    @property
    def title(self) -> str:
        """For tables."""
        return f"{self.rows} general rows{', their answers in a foreign form' * self.foreign}"


@dataclass(frozen=True)
class Setting:
    """The setting of one method in one regime.

    Attributes:
      rate: of learning, relative to the regime's.
      weight: of what is replayed.
      energy: share of the second moment of the inputs that the basis covers.
      share: of general rows in every batch, where they are mixed in.
    """

    rate: float = 1.0
    weight: float = 1.0
    energy: float = 0.98
    share: float = 0.5


PLENTY: Final = Regime(400)
SCARCE: Final = Regime(80)
FOREIGN: Final = Regime(80, foreign=True)
EASY: Final = Regime(80, rate=2.5)  # in a world for two layers, which learn faster

SETTINGS: Final[dict[Regime, dict[str, Setting]]] = {
    PLENTY: {
        "naive": Setting(rate=0.5),
        "lora": Setting(rate=2.0),
        "paper": Setting(rate=0.5),
        "momentum": Setting(rate=1.0),
        "mixing": Setting(rate=2.0, share=0.75),
        "replay": Setting(rate=2.0, weight=8.0),
        "replay-initial": Setting(rate=2.0, weight=1.0),
        "recommended": Setting(rate=3.0),
        "recommended-replay": Setting(rate=4.0, weight=8.0, energy=0.95),
    },
    SCARCE: {
        "naive": Setting(rate=0.5),
        "lora": Setting(rate=2.0),
        "paper": Setting(rate=0.5),
        "momentum": Setting(rate=1.0),
        "mixing": Setting(rate=1.0, share=0.75),
        "replay": Setting(rate=1.0, weight=64.0),
        "replay-initial": Setting(rate=1.0, weight=8.0),
        "recommended": Setting(rate=3.0),
        "recommended-replay": Setting(rate=4.0, weight=8.0, energy=0.98),
    },
    FOREIGN: {
        "naive": Setting(rate=0.5),
        "lora": Setting(rate=2.0),
        "paper": Setting(rate=0.5),
        "momentum": Setting(rate=1.0),
        "mixing": Setting(rate=1.0, share=0.5),
        "replay": Setting(rate=1.0, weight=1.0),
        "replay-initial": Setting(rate=1.0, weight=1.0),
        "recommended": Setting(rate=3.0),
        "recommended-replay": Setting(rate=3.0, weight=1.0, energy=0.95),
    },
    EASY: {  # not of the study
        "naive": Setting(),
        "mixing": Setting(),
        "replay": Setting(weight=8.0),
        "recommended": Setting(rate=3.0),
    },
}
