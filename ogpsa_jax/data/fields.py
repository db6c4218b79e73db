"""What the columns of public data sets mean, whatever the format: the rules for those it ignores.

The format uses a field that is not empty; or the field is ignored, because it is not part of the
prompt or the answer (ids, sources, scores); or it is part of them, and the row is refused; or it is
unknown, and one warning names it for all rows. A row may also say that its answer is bad.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from ogpsa_jax.data.records import Row
from ogpsa_jax.data.turns import FLAGS, ROLES
from ogpsa_jax.errors import InputError

SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
_TURN = frozenset({"role", "content", "from", "value", "refusal", *FLAGS})

# Part of the prompt or of the answer: without it, the model would learn something else.
_PART_OF_TEXT = re.compile(
    r"(available_)?(tools|functions)|(tool|function)_calls?|tool_choice|history|contexts?|passages?|"
    r"documents|knowledge|images?|videos?|audios?|files|chat_template_kwargs|prefix|suffix|"
    r"(.*_)?(reasoning|thinking)(_.*)?|think|thoughts?|chain_of_thought|(.*_)?cot|"
    + "|".join(SYSTEM)
)
# Fields that are not part of the prompt or the answer.
_CARRIED = re.compile(
    r"|_+index_level_\d+_+|unnamed:?_*\d+|"  # of data frames
    r"(.*_)?(ids?|idx|index|uid|uuid|guid|hash|sha256|md5|key|url|link)|"
    r"(.*_)?(sources?|datasets?|subset|origins?|splits?|config|models?|authors?|annotators?|"
    r"licen[sc]e|lang|languages?|locale)|"
    r"(.*_)?(date|time|timestamp|created|updated)(_at)?|"
    r"(.*_)?(category|categories|types?|tasks?|domain|topics?|tags?|difficulty|level|meta|metadata)|"
    r"(.*_)?(scores?|ratings?|ranks?|rewards?|margin|logps?|perplexity|length|len|tokens|count)|"
    r"(score|rating|reward|num)_.*|helpfulness|correctness|coherence|complexity|verbosity|"
    r"(is_)?prompt_.*(label|safe|harmful|toxic)"  # a verdict on the question
)

# Columns that judge the row's answer: true is good, or true is bad.
_PLACE = r"(is_|was_|has_)?((response|answer|completion|output|assistant|chosen|final)_)?(is_)?"
_GOOD = re.compile(
    _PLACE + r"(safe|harmless|unharmful|correct|good|acceptable|accepted|preferred|chosen|"
    r"desirable|desired|valid|approved|accept|passed|helpful|truthful|faithful|thumbs_up|upvoted)"
    r"(_label|_flag)?"
)
_BAD = re.compile(
    _PLACE + r"(unsafe|harm|harmful|toxic|bad|rejected|hallucination|hallucinated|flagged|"
    r"jailbroken|deleted|spam|incorrect|wrong|undesirable|invalid|offensive|unhelpful|dangerous|"
    r"thumbs_down|downvoted)(_label|_flag)?"
)
_OF_ANSWER = re.compile(r"_(response|answer|completion|output)$")  # as in is_harmful_response
_OPEN = ("label", "kto_tag", "verdict", "review_result", "quality", "safety", "feedback")
# Others, in which only a word of the following counts: Aegis' response_label, a guard's verdict.
_JUDGES = re.compile(
    r"(?!(is_)?(prompt|question|query|user|input|instruction|request)_)"
    r"((.*_)?(labels?|verdict|annotation|judge?ment|quality|safety|feedback|votes?|status|ratings?|"
    r"scores?|grade|decision|guard(_\d+)?|review_result)|(response|answer|completion|output)_\w+)"
)
_GOOD_WORDS = frozenset(
    "safe harmless unharmful nontoxic good correct desirable acceptable accepted positive passed "
    "pass preferred chosen approved valid helpful thumbs_up".split()
)
_BAD_WORDS = frozenset(
    "unsafe harmful toxic bad incorrect wrong undesirable unacceptable negative failed fail "
    "rejected flagged invalid unhelpful hallucinated jailbroken thumbs_down".split()
)
_OF_OTHER_THINGS = frozenset({"positive", "negative", "valid", "invalid", "pass", "fail"})
# Columns that rate the row's answer. Their scales differ; on all of them 0 or less is bad.
RATINGS = (
    "score",
    "rating",
    "overall_score",
    "overall_rating",
    "quality_score",
    "helpfulness",
    "correctness",
)
_RATED = re.compile(
    r"(?!(prompt|question|query|user|input|instruction|request)_)(.*_)?(score|rating|reward)"
)
_ANSWERS = ("messages", "conversations", "completion", "response", "output", "answer")


def unused(row: Row, where: str, format_name: str, uses: frozenset[str], pair: bool) -> list[str]:
    """The row's fields that the format does not use and that are unknown.

    Args:
      row: the row.
      where: of the row, for the message.
      format_name: for the message.
      uses: the format's columns.
      pair: whether the row contains two answers, so that no column judges the one.

    Raises:
      InputError: a field that is part of what is asked or answered.
    """
    found = []
    for column, value in row.items():
        if _without_word(column, value):
            continue
        if column in uses:
            turns = value if isinstance(value, list) else [value]
            said = [pair for t in turns if isinstance(t, Mapping) for pair in t.items()]
            keys = [k for k, v in said if not _without_word(k, v) and _verdict(k, v) is None]
            found += [(f"{column}[].{k}", k) for k in dict.fromkeys(keys) if k not in _TURN]
        elif pair or _verdict(column, value, where) is None:
            found.append((column, column))
    found = [pair for pair in found if not _carried(pair[1], row.get(pair[1]))]
    for name, field in found:
        if _PART_OF_TEXT.fullmatch(_plain(field)):
            raise InputError(
                f"{where}: '{name}' is part of what is asked or answered, but the format "
                f"{format_name} does not use it; write it into the text as the chat template shows "
                "it, or remove the field."
            )
    return [name for name, _ in found]


def bad_answer(row: Row, where: str) -> str:
    """How a row says that its one answer is bad; empty if it does not.

    Raises:
      InputError: a column that judges the answer and cannot be understood.
    """
    for column, value in row.items():
        if _empty(value, but=False):
            continue
        if _verdict(column, value, where) is False:
            return f"'{column}' says that the answer is bad"
        if isinstance(value, Mapping) and _plain(column) != "category":  # {"meta": {"is_safe": …}}
            for name, said in value.items():
                if not _empty(said, but=False) and _verdict(name, said) is False:
                    return f"'{column}.{name}' says that the answer is bad"
    for column, rating in ratings(row).items():
        if rating <= 0 and column in RATINGS:
            return f"'{column}' rates the answer 0 or less"
    for column in _ANSWERS:
        if name := _bad_turn(row.get(column)):
            return f"'{column}[].{name}' says that the answer is bad"
    return ""


def _bad_turn(turns: Any) -> str:
    """The field by which one of the assistant's turns that are trained on is called bad."""
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, Mapping):
            continue
        if ROLES.get(str(turn.get("role", turn.get("from")))) != "assistant":
            continue
        if any(key in turn and not turn[key] for key in FLAGS if turn.get(key) is not None):
            continue
        for name, said in turn.items():
            if name not in _TURN and not _empty(said, but=False):
                rating = _number(said) if name in RATINGS else None
                if _verdict(name, said) is False or (rating is not None and rating <= 0):
                    return str(name)
    return ""


def ratings(row: Row) -> dict[str, float]:
    """What the row rates its one answer, by column."""
    found = {c: _number(v) for c, v in row.items() if c in RATINGS or _RATED.fullmatch(_plain(c))}
    return {column: rating for column, rating in found.items() if rating is not None}


def bad_pair(row: Row, where: str) -> str:
    """How a row says that its chosen answer is not the better one; empty if it does not."""
    for column, value in row.items():
        name = _plain(column)
        if ("chosen" not in name and name != "margin") or _empty(value, but=False):
            continue
        if name != "chosen" and _verdict(name, value, where) is False:
            return f"'{column}' says that the chosen answer is bad"
        if name == "margin" and (_number(value) or 0) < 0:
            return f"'{column}' is below 0"
        other = str(column).replace("chosen", "rejected")
        if re.search("score|rating|reward", name):
            chosen, rejected = _number(value), _number(row.get(other))
            if chosen is not None and rejected is not None and chosen < rejected:
                return f"'{column}' is below '{other}'"
    return ""


def _verdict(column: Any, value: Any, where: str | None = None) -> bool | None:
    """Whether a column calls the answer good; None if it does not judge it.

    Raises:
      InputError: it may judge the answer and cannot be understood, if `where` is given.
    """
    name = _plain(column)
    if isinstance(value, bool):
        name = _OF_ANSWER.sub("", name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    true_is_good = bool(_GOOD.fullmatch(name)) or name in _OPEN
    judges = true_is_good or bool(_BAD.fullmatch(name))
    if not judges and not _JUDGES.fullmatch(name):
        return None
    if name in ("chosen", "rejected") and isinstance(value, str):  # an answer, no verdict on one
        return None
    said = str(value).strip().lower()
    word = said.partition("\n")[0].strip(" .!")  # Llama Guard goes on with a line of categories
    word, denials = re.subn(r"^(not|non)_", "", re.sub(r"[- ]", "_", word))
    if word in _GOOD_WORDS | _BAD_WORDS and (judges or word not in _OF_OTHER_THINGS):
        return (word in _GOOD_WORDS) == (denials == 0)
    if not judges:
        return None
    truth = {"true": True, "yes": True, "false": False, "no": False}.get(said)
    number = _number(value)
    if number == -1 and name in _OPEN:
        return False
    if truth is None and number in (0, 1):
        if name in _OPEN and name != "kto_tag":  # 1 is good here and harmful there
            if where is None:
                return None
            raise InputError(
                f"{where}: '{column}' may judge the answer, but {value!r} is ambiguous; write "
                "true where the answer is good and false where it is bad, or remove the column."
            )
        truth = bool(number)
    if truth is None and name.startswith("is_") and where is not None:
        raise InputError(
            f"{where}: '{column}' must be true or false, found {value!r}; fix the row."
        )
    return None if truth is None else truth == true_is_good


def _plain(name: Any) -> str:
    words = re.sub(r"(?<=[a-z\d])(?=[A-Z][a-z])", "_", str(name).strip())  # isSafe
    return re.sub(r"[-. ]+", "_", words.lower())


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _carried(column: Any, value: Any) -> bool:
    """Whether a field says nothing of what is asked and answered."""
    # `task` contains a name, or what is to be done.
    told_to_do = isinstance(value, str) and len(value.split()) > 3
    name = _plain(column)
    return bool(_CARRIED.fullmatch(name)) and not (name == "task" and told_to_do)


def _without_word(column: Any, value: Any) -> bool:
    """Whether a field says nothing: it is empty, or a part of the text that is not there."""
    return _empty(value, but=None if _PART_OF_TEXT.fullmatch(_plain(column)) else False)


def _empty(value: Any, *, but: Any = None) -> bool:
    """Whether a field contains nothing; `but` is a value that counts as something."""
    if isinstance(value, bool):
        return value is False and but is not False
    if isinstance(value, float):
        return math.isnan(value)  # what data frames write for nothing
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "None")
    return value is None or (isinstance(value, list | Mapping) and not value)
