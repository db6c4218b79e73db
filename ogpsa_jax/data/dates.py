"""The day that a chat template prints as today's: one day for a whole run."""

import datetime
import re

from ogpsa_jax.errors import InputError

# What templates print that ask for the day's date, unless the caller names a day: a score must not
# depend on the day it is taken. It is the default of the templates that print one (Llama 3).
DEFAULT_DATE = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"""\bstrftime_now\(\s*(["'])(.*?)\1\s*\)""")
_ASKS_TODAY = re.compile(r"\bstrftime_now\b(?!\s+is\s+(not\s+)?defined\b)")


def on_day(source: str | None, date: datetime.date) -> str | None:
    """The template with a day in the place of the day's date.

    Raises:
      InputError: it asks for the date in other ways than by a format that stands in it.
    """
    if source is None:
        return None

    def formatted(match: re.Match[str]) -> str:
        return match[1] + date.strftime(match[2]) + match[1]

    found = _TODAY.sub(formatted, source)
    if _ASKS_TODAY.search(found):
        raise InputError(
            "template: it uses strftime_now otherwise than called with a text, so that the date "
            "cannot be kept the same for a whole run; write the format into the call."
        )
    return found
