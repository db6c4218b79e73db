"""Telling how far slow work is that has no bar: a line every ten seconds, with the time left."""

import logging
import time

logger = logging.getLogger(__name__)
_EVERY = 10.0  # seconds


class Countdown:
    """Work of which some parts are done; nothing is said of work that is done at once.

    Args:
      what: is being done.
      total: parts in all.
      unit: what the parts are, in the plural.
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._started = self._told = time.perf_counter()

    def at(self, done: int) -> None:
        """So many are done."""
        now = time.perf_counter()
        if not done or now - self._told < _EVERY:
            return
        self._told = now
        left = (now - self._started) / done * (self._total - done)
        logger.info(
            "%s: %s of %s %s, %.0f s left",
            *(self._what, f"{done:,}", f"{self._total:,}", self._unit, left),
        )
