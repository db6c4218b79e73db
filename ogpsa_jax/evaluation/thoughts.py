"""Thoughts that a model writes before its answer are not part of the answer.

Reasoning models write their thoughts first, between markers that differ from family to family; an
answer that was cut may contain nothing else. Scores look at what follows the thoughts.
"""

import re
from typing import Any

# <think> (Qwen, DeepSeek and most others), <thinking>, <thought>, <reasoning>, <seed:think>, ...
_NAME = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)"
_OPENINGS = (
    rf"<\|?{_NAME}\|?>",
    r"\[think\]",  # Mistral
    r"◁think▷",  # Kimi
    r"<\|begin_of_thought\|>",
    r"<\|start_thinking\|>",  # Cohere
    r"<unused94>(?:thought)?",  # MedGemma
    r"(?:<\|start\|>assistant)?<\|channel\|?>\s*(?:analysis|commentary|thought)(?:<\|message\|>)?",
)
_CLOSINGS = (
    rf"<\|?/{_NAME}\|?>",
    r"\[/think\]",
    r"◁/think▷",
    r"<\|end_of_thought\|>",
    r"<\|end_thinking\|>",
    r"<unused95>",
    r"<\|channel\|>\s*final(?:<\|message\|>)?",  # gpt-oss
    r"<channel\|>",  # Gemma 4
)
_MARKER = re.compile(rf"(?P<opens>{'|'.join(_OPENINGS)})|{'|'.join(_CLOSINGS)}", re.I)
_TAIL = re.compile(rf"(?:{'|'.join(_OPENINGS)})\s*$", re.I)
# gpt-oss where the decoder has dropped its special tokens.
_BARE_CHANNEL = re.compile(r"\s*analysis(?=[A-Z\"'(])")
_BARE_FINAL = "assistantfinal"
# What frames an answer after its thoughts.
_FRAME = re.compile(
    r"^\s*<\|(?:begin_of_solution|start_response)\|>|<\|(?:end_of_solution|end_response|end|return)"
    r"\|>\s*$",
    re.I,
)
_SPECIAL = re.compile(r"think|thought|channel|message|reason|unused9[45]|<\|(?:start|end)\|>", re.I)


def without_thoughts(answer: str) -> str:
    """What a model says to its user.

    Args:
      answer: all that the model wrote.

    Returns:
      The text without thoughts; empty where they do not end. A closing marker without an opening
      one ends thoughts that began in the prompt.
    """
    if _BARE_CHANNEL.match(answer):
        _, found, text = answer.rpartition(_BARE_FINAL)
        return text.strip() if found else ""
    kept, at, inside, marked = [""], 0, False, False
    for marker in _MARKER.finditer(answer):
        marked = True
        if marker["opens"] is None:
            if not inside:
                kept = []  # these thoughts began in the prompt
            at, inside = marker.end(), False
        elif not inside:
            kept.append(answer[at : marker.start()])
            inside = True
    if not marked:
        return answer
    if not inside:
        kept.append(answer[at:])
    return _FRAME.sub("", "".join(kept)).strip()


def only_thoughts(answer: str) -> bool:
    """Whether an answer was cut within its thoughts, or ends with them."""
    return bool(answer.strip()) and not without_thoughts(answer).strip()


def opened_thoughts(prompt: str) -> str:
    """The marker with which a prompt opens the model's thoughts, or the empty string.

    Args:
      prompt: as rendered by a chat template, special tokens included.
    """
    found = _TAIL.search(prompt)
    return found.group() if found else ""


def marks_thoughts(token: str) -> bool:
    """Whether a special token marks thoughts."""
    return bool(_SPECIAL.search(token))


def decoded(tokenizer: Any, ids: list[int]) -> str:
    """Text of an answer's token ids, without special tokens but those that mark thoughts."""
    special = set(tokenizer.all_special_ids)
    kept = [
        i
        for i in ids
        if i not in special or marks_thoughts(str(tokenizer.convert_ids_to_tokens(i)))
    ]
    return str(tokenizer.decode(kept, skip_special_tokens=False))
