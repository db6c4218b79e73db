"""Examples: tokenised rows, and a report on the rows they come from."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_TOLD = 20  # refused rows that a report names


@dataclass(frozen=True)
class Tokens:
    """One sequence.

    Attributes:
      ids: int32 ``[length]``.
      loss_mask: bool ``[length]``: whether the token there is in the loss mask.
    """

    ids: np.ndarray
    loss_mask: np.ndarray


@dataclass(frozen=True)
class Predictions:
    """A teacher's predictions for one sequence: a row for each token in the loss mask.

    Attributes:
      ids: int32 ``[tokens in the loss mask, k]``, its likeliest tokens.
      log_probs: float32 ``[tokens in the loss mask, k]``.
      rest: float32 ``[tokens in the loss mask]``, logarithm of the mass of all other tokens.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    rest: np.ndarray


@dataclass(frozen=True)
class Example:
    """One sequence, or two (chosen, rejected) for a pair.

    Attributes:
      sequences: their tokens.
      source: the number of the data set it is from.
      reference_logps: of chosen and rejected, by the reference model of a preference loss.
      teacher: of a single sequence, what it is compared with instead of its tokens.
    """

    sequences: tuple[Tokens, ...]
    source: int = 0
    reference_logps: tuple[float, float] | None = None
    teacher: Predictions | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(tokens.ids) for tokens in self.sequences)


@dataclass
class DataReport:
    """How the rows were used.

    Attributes:
      rows: examples made.
      tokens: in all of them.
      loss_tokens: tokens in the loss mask.
      truncated: examples cut to the length limit.
      cut_prompts: those of them whose prompt was cut, because it left no room for an answer.
      lengths: tokens of every conversation before it was cut.
      split: conversations that came to several examples, because the template shows an earlier turn
        otherwise than when it is answered.
      skipped: rows that say of themselves that they do not count, by the way they say it.
      prompts_alone: rows without an answer, whose own tokens are trained on.
      refused: pairs, and rows passed over in a draw, that were left out: place and reason.
      notes: sentences on what of the rows is not used.
    """

    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    cut_prompts: int = 0
    lengths: list[int] = field(default_factory=list)
    split: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prompts_alone: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Counts for the summary, why rows are skipped, and the first refused rows by name."""
        counts: dict[str, Any] = {
            "rows": self.rows,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "truncated_rows": self.truncated,
            "cut_prompts": self.cut_prompts,
            "skipped_rows": self.skipped.total(),
            "refused_rows": len(self.refused),
        }
        if self.split:
            counts["split_rows"] = self.split
        if self.prompts_alone:
            counts["prompts_alone"] = self.prompts_alone
        if self.skipped:
            counts["skipped"] = dict(self.skipped)
        if self.refused:
            counts["refused"] = self.refused[:_TOLD]
        return counts


def digest(examples: Sequence[Example], start: bytes = b"") -> str:
    """A hash of every token and whether it is trained on; `start` goes in first."""
    found = hashlib.blake2b(start, digest_size=20)
    for example in examples:
        for tokens in example.sequences:
            found.update(np.int64(len(tokens.ids)).tobytes())
            found.update(np.ascontiguousarray(tokens.ids, np.int32).tobytes())
            found.update(np.ascontiguousarray(tokens.loss_mask, bool).tobytes())
    return found.hexdigest()
