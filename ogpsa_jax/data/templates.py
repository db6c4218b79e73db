"""Chat templates, and which of the rendered tokens are the assistant's.

The tokenizer's own template is used unless another is named. The assistant's tokens are found
whether or not the template marks them with ``{% generation %}``. Whatever a model has to write
itself is learnt: all that follows the generation prompt, up to and with the token that ends the
answer, so that a model learns to stop.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ogpsa_jax.data.records import Message
from ogpsa_jax.errors import InputError

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Written from the formats' public descriptions; each ends an answer with a token to stop at.
BUILT_IN: dict[str, str] = {
    "chatml": _CHATML,
    "qwen": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created by "
        "Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{% endif %}" + _CHATML
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% endif %}"
    ),
    "llama2": (
        "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% set ns.system = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}"
        "{% elif m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + ns.system + m['content'] + ' [/INST]' }}"
        "{% set ns.system = '' %}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
        "{% elif m['role'] == 'user' %}{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}"
        "{% set ns.system = '' %}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
        "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + "
        "'\n\n### Response:\n' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "vanilla": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
        "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    ),
}
_PROBE = "\u27e8answer\u27e9"
_MARKED = re.compile(r"\{%-?\s*generation\b")
# Templates that print a date (Llama 3) print this one, whatever the day: a run that is resumed on
# another day must see the same tokens. It is those templates' own default.
_DATE = "26 Jul 2024"

Conversation = tuple[Sequence[Message], str]  # the turns, and where they stand
Encoded = tuple[list[int], list[bool]]  # token ids, and which of them are to be learnt


def load_tokenizer(path: str) -> Any:
    """A fast tokenizer from a local folder or a hub id; nothing of it is executed.

    Raises:
      InputError: no tokenizer there, not a fast one, or one without a token to stop at.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"{path}: no tokenizer could be loaded ({reason}).") from error
    if not tokenizer.is_fast or not tokenizer.backend_tokenizer.get_vocab_size(False):
        raise InputError(f"{path}: the tokenizer has no tokenizer.json; convert it to a fast one.")
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{path}: the tokenizer has no eos_token, so no model could learn to stop; name one in "
            "tokenizer_config.json."
        )
    return tokenizer


class ChatTemplate:
    """Renders conversations and finds the assistant's part in them.

    Where neither a template is named nor the tokenizer has one, plain text can still be encoded;
    the first conversation then raises :class:`InputError`.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        """Check the template.

        Args:
          tokenizer: a fast tokenizer.
          template: a built-in name (see :data:`BUILT_IN`) or a jinja file; None: the tokenizer's.

        Raises:
          InputError: no such template, or one that does not show what the assistant says.
        """
        self.tokenizer = tokenizer
        self.source = _template_source(tokenizer, template)
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._stops = ({*special, *tokenizer.all_special_ids} - {bos}) | {tokenizer.eos_token_id}
        self._marks = False
        if self.source is None:
            return
        self._marks = bool(_MARKED.search(self.source))
        asked = [Message("user", "a")]
        # Whether the template writes the header of an answer when asked to.
        self._prompts = self.render(asked, generation_prompt=True) != self.render(asked)
        probe = self.render([*asked, Message("assistant", _PROBE)])
        _, found, self._tail = probe.partition(_PROBE)
        if not found:
            name = template or "the tokenizer's own"
            raise InputError(
                f"template ({name}): it does not show what the assistant says; choose another."
            )

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        where: str = "template",
    ) -> str:
        """The conversation as text.

        Raises:
          InputError: there is no template, or it refuses this conversation.
        """
        return self._apply(messages, where, add_generation_prompt=generation_prompt)[0]

    def encode(self, messages: Sequence[Message], where: str) -> Encoded:
        """Token ids of one conversation, and which of them are to be learnt.

        Raises:
          InputError: the template yields no assistant token for this row.
        """
        return self.encode_all([(messages, where)])[0]

    def encode_all(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """:meth:`encode` for many conversations, tokenised in one call."""
        if not conversations:  # tokenizers refuse to do nothing
            return []
        found = self._tokenised(conversations)
        return [
            self._finished(ids, learnt, where)
            for (ids, learnt), (_, where) in zip(found, conversations, strict=True)
        ]

    def stop_tokens(self) -> tuple[int, ...]:
        """What ends an answer under this template, and what ends a document."""
        eos = int(self.tokenizer.eos_token_id)
        if self.source is None:
            return (eos,)
        ids, _ = self.encode([Message("user", "a"), Message("assistant", "b")], "template")
        return tuple(dict.fromkeys((next(i for i in reversed(ids) if i in self._stops), eos)))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant starts to speak."""
        text = self.render(messages, generation_prompt=True)
        return self._begun(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a document, from BOS (where the tokenizer has one) to EOS."""
        ids = self._begun(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _begun(self, ids: Sequence[int]) -> list[int]:
        """Led by BOS if the tokenizer wants it, and never by two."""
        return [*ids] if not self._bos or list(ids[:1]) == self._bos else [*self._bos, *ids]

    def _apply(
        self, messages: Sequence[Message], where: str, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the parts of it that the template marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.source is None:
            raise InputError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no chat template; set "
                f"data.template to a jinja file or one of {', '.join(BUILT_IN)}."
            )
        turns = [{"role": m.role, "content": m.content} for m in messages]
        given = {**self.tokenizer.special_tokens_map, "date_string": _DATE, **options}
        try:
            # Not apply_chat_template: its token mask fails on an empty part, and misses tokens
            # where a part ends with a character of several tokens.
            texts, marks = render_jinja_template([turns], chat_template=self.source, **given)
        except Exception as error:  # a template is a program: it may fail in every way
            raise InputError(
                f"{where}: the chat template cannot render the conversation ({error}); mend the "
                "template or the row, or set data.template to another."
            ) from error
        return texts[0], marks[0] if marks else []

    def _tokenised(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        texts, spans = [], []
        for messages, where in conversations:
            text, parts = self._apply(messages, where, return_assistant_tokens_mask=self._marks)
            texts.append(text)
            spans.append(parts if self._marks else self._spans(messages, text, where))
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        found = []
        for ids, offsets, parts in zip(
            encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
        ):
            first, last = np.asarray(offsets, np.int64).reshape(-1, 2).T
            learnt = np.zeros(len(ids), bool)
            for start, stop in parts:
                if start < stop:
                    learnt |= (first < stop) & (np.maximum(last, first + 1) > start)
            found.append((list(ids), learnt.tolist()))
        return found

    def _spans(self, messages: Sequence[Message], text: str, where: str) -> list[tuple[int, int]]:
        """Where in the text each answer stands, from its first character to the next turn."""
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message.role != "assistant" or not message.learnt:
                continue
            start = self._start(messages, i, text, spans[-1][1] if spans else 0)
            upto = self.render(messages[: i + 1], where=where) if i + 1 < len(messages) else text
            ended = len(upto) > start and text.startswith(upto)
            stop = len(upto) if ended else len(text)
            places = [
                (at, -len(said))
                for said in _variants(message.content)
                if said and (at := text.find(said, start, stop)) >= 0
            ]
            if places and not ended:  # the last answer is treated otherwise, as in Qwen3's template
                stop = min(places)[0] - min(places)[1]
                stop += len(self._tail) if text.startswith(self._tail, stop) else 0
            if not places:
                raise InputError(
                    f"{where}: the chat template changes or drops the assistant's text; set "
                    "data.template to one that keeps it."
                )
            spans.append((start, stop))
        return spans

    def _start(self, messages: Sequence[Message], i: int, text: str, floor: int) -> int:
        """Where answer `i` begins: after the generation prompt, if the template writes one."""
        before = self.render(messages[:i], generation_prompt=True)
        led = text.startswith(before)
        if led and self._prompts:
            return len(before)
        # The same conversation with an answer that no template alters shows what precedes it.
        probe = self.render([*messages[:i], Message("assistant", _PROBE)])
        head = probe.partition(_PROBE)[0]
        if text.startswith(head):
            # A space that the template puts before the answer, the model must write.
            blank = led and not head[len(before) :].strip()
            return len(before) if blank else len(head)
        asked = messages[i - 1].content.strip()
        after = max(text.find(asked, floor) + len(asked), floor)
        found = (text.find(said, after) for said in _variants(messages[i].content) if said)
        return min((at for at in found if at >= 0), default=after)

    def _finished(self, ids: list[int], learnt: list[bool], where: str) -> Encoded:
        """BOS in front, every answer ended by a token to stop at, nothing after the last one."""
        begun = self._begun(ids)
        learnt = [False] * (len(begun) - len(ids)) + learnt
        ids = begun
        if not any(learnt):
            raise InputError(
                f"{where}: the chat template yields no assistant token, so there is nothing to "
                "learn; set data.template, or mend the row."
            )
        ends = [i + 1 for i in range(len(ids)) if learnt[i] and not any(learnt[i + 1 : i + 2])]
        for end in ends:
            if end < len(ids) and not self._stopped(ids, end) and ids[end] in self._stops:
                learnt[end] = True
        last = ends[-1] + (1 if learnt[ends[-1] : ends[-1] + 1] == [True] else 0)
        ids, learnt = ids[:last], learnt[:last]
        if not self._stopped(ids, last):
            ids, learnt = [*ids, self.tokenizer.eos_token_id], [*learnt, True]
        return ids, learnt

    def _stopped(self, ids: Sequence[int], end: int) -> bool:
        """Whether a token to stop at, and perhaps white space after it, precedes `end`."""
        while end > 0 and ids[end - 1] not in self._stops:
            if self.tokenizer.decode([ids[end - 1]]).strip():
                return False
            end -= 1
        return end > 0


def _variants(content: str) -> tuple[str, str, str]:
    """How templates show an answer: as it is, stripped, or without the reasoning before it."""
    return content, content.strip(), content.rpartition("</think>")[2].strip()


def _template_source(tokenizer: Any, template: str | None) -> str | None:
    if template in BUILT_IN:
        return BUILT_IN[str(template)]
    if template is not None:
        try:
            return Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"data.template: '{template}' is neither a readable file nor one of "
                f"{', '.join(BUILT_IN)}."
            ) from error
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return str(own) if own else None
