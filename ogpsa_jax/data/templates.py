"""Chat templates, and which of the rendered tokens are the assistant's.

The tokenizer's own template is used unless another is named. The prompt of training is the prompt
of use: for every turn that is trained on, a sequence begins with exactly the tokens that a model is
given when it has to write that turn (``add_generation_prompt``). What follows them is trained on,
the token that ends the turn included. A turn for which the template does not allow this is refused
with the two texts side by side.
"""

import datetime
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ogpsa_jax.data.built_in import BUILT_IN, template_source
from ogpsa_jax.data.dates import DEFAULT_DATE, on_day
from ogpsa_jax.data.records import Message
from ogpsa_jax.errors import InputError

_PROBE = "\u27e8answer\u27e9"
_MARKED = re.compile(r"\{%-?\s*generation\b")
_THOUGHT = re.compile(r"</?think>")
_SHOWN = 60  # characters that a message shows of each of two texts that differ

Conversation = tuple[Sequence[Message], str]  # the turns, and where they stand
Encoded = tuple[list[int], list[bool]]  # token ids, and which of them are in the loss mask


@dataclass(frozen=True)
class _Turn:
    """An answer: what a model is given to write it, and the same text with the answer."""

    prompt: str
    whole: str
    name: str  # for messages: the row, and the turn where the row has several


class ChatTemplate:
    """Renders conversations and finds the assistant's part in them.

    Where neither a template is named nor the tokenizer has one, plain text can still be encoded;
    the first conversation then raises :class:`InputError`.

    Attributes:
      source: the template's text, None where there is none.
      dated: the same, with the date in the place of today's.
      unknown_end: what the template writes after an answer, where none of the tokenizer's special
        tokens is in it, so that a model writes it out as any other text; otherwise empty.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        *,
        date: datetime.date = DEFAULT_DATE,
    ) -> None:
        """Check the template.

        Args:
          tokenizer: a fast tokenizer.
          template: a built-in name (see :data:`BUILT_IN`) or a jinja file; None: the tokenizer's.
          date: what the template prints as today's date (``strftime_now``).

        Raises:
          InputError: no such template, or one that does not show what the assistant says.
        """
        self.tokenizer = tokenizer
        self.source = template_source(tokenizer, template)
        self.dated = on_day(self.source, date)
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = ({*special, *tokenizer.all_special_ids} - {bos}) | {tokenizer.eos_token_id}
        self._marks, self._closing, self.unknown_end = False, "", ""
        self._stops: tuple[int, ...] = (int(tokenizer.eos_token_id),)
        if self.source is None:
            return
        self._marks = bool(_MARKED.search(self.source))
        probe = self.render([Message("user", "a"), Message("assistant", _PROBE)])
        _, found, self._closing = probe.rpartition(_PROBE)
        if not found:
            name = template or "the tokenizer's own"
            raise InputError(
                f"template ({name}): it does not show what the assistant says; choose another."
            )
        ending = [i for i in self._ids([self._closing])[0] if i in self._special]
        self._stops = tuple(dict.fromkeys((*ending[:1], *self._stops)))
        self.unknown_end = "" if ending else self._closing.strip()

    @property
    def exported(self) -> str | None:
        """The template for others to use, with BOS where the tokenizer leads texts with it.

        Other programs render a chat without the tokenizer's own BOS.
        """
        if self.source is None or not self._bos:
            return self.source
        [ids] = self._ids([self.render([Message("user", "a")])])
        return self.source if ids[:1] == self._bos else "{{ bos_token }}" + self.source

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
        """Token ids of one conversation, and which of them are in the loss mask.

        Raises:
          InputError: the template yields no assistant token for this row, or a turn whose prompt in
            training would not be the prompt of use, or several sequences (see :meth:`encode_all`).
        """
        [found] = self.encode_all([(messages, where)])
        if isinstance(found, InputError):
            raise found
        if len(found) > 1:
            raise InputError(
                f"{where}: the chat template shows an earlier turn otherwise than when it is "
                f"answered, so that the row comes to {len(found)} sequences; encode them with "
                "encode_all, or mark the earlier answers as not trained on."
            )
        return found[0]

    def encode_all(self, conversations: Sequence[Conversation]) -> list[list[Encoded] | InputError]:
        """:meth:`encode` for many conversations, tokenised in one call.

        Returns:
          For each conversation its sequences, or why it cannot be trained on. There is one sequence
          unless the template shows an earlier turn otherwise than when it is answered (Qwen3 drops
          the thoughts of earlier turns): such a turn comes in a sequence of its own, which ends
          with it.

        Raises:
          InputError: there is no template.
        """
        turns: list[list[_Turn] | InputError] = []
        for messages, where in conversations:
            self._require()
            try:
                turns.append(self._turns(messages, where))
            except InputError as error:
                turns.append(error)
        asked = [turn for found in turns if not isinstance(found, InputError) for turn in found]
        ids = iter(self._ids([text for turn in asked for text in (turn.prompt, turn.whole)]))
        return [
            found if isinstance(found, InputError) else self._sequences(found, ids)
            for found in turns
        ]

    def stop_tokens(self) -> tuple[int, ...]:
        """What ends an answer under this template, and what ends a document."""
        return self._stops

    def stop_texts(self) -> list[str]:
        """The texts of :meth:`stop_tokens` that cannot be part of another text."""
        added = self.tokenizer.added_tokens_decoder
        return [added[i].content for i in self._stops if i in added]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to where the assistant starts to speak."""
        return self._begun(self._ids([self.render(messages, generation_prompt=True)])[0])

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a document, from BOS (where the tokenizer has one) to EOS."""
        ids = self._begun(self._ids([text])[0])
        eos = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:  # tokenizers refuse to do nothing
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return [list(ids) for ids in found["input_ids"]]

    def _begun(self, ids: Sequence[int]) -> list[int]:
        """Led by BOS if the tokenizer wants it, and never by two."""
        return [*ids] if not self._bos or list(ids[:1]) == self._bos else [*self._bos, *ids]

    def _require(self) -> None:
        if self.source is None:
            raise InputError(
                f"{self.tokenizer.name_or_path}: the tokenizer has no chat template; set "
                f"data.template to a jinja file or one of {', '.join(BUILT_IN)}."
            )

    def _apply(
        self, messages: Sequence[Message], where: str, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the parts of it that the template marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        self._require()
        turns = [{"role": m.role, "content": m.content} for m in messages]
        given = {**self.tokenizer.special_tokens_map, **options}
        try:
            # Not apply_chat_template: its token mask fails on an empty part, and misses tokens
            # where a part ends with a character of several tokens.
            texts, marks = render_jinja_template([turns], chat_template=self.dated, **given)
        except Exception as error:  # a template is a program: it may fail in every way
            raise InputError(
                f"{where}: the chat template cannot render the conversation ({error}); fix the "
                "template or the row, or set data.template to another."
            ) from error
        return texts[0], marks[0] if marks else []

    def _turns(self, messages: Sequence[Message], where: str) -> list[_Turn]:
        """The turns in the loss mask.

        Raises:
          InputError: there is none, or the template does not let one be trained on as it is asked.
        """
        found = []
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for i in answers:
            if not messages[i].trained:
                continue
            name = f"{where}: turn {i + 1}" if len(answers) > 1 else where
            prompt = self.render(messages[:i], generation_prompt=True, where=name)
            whole, marks = self._apply(
                messages[: i + 1], name, return_assistant_tokens_mask=self._marks
            )
            if not whole.startswith(prompt):
                start = max(_common(prompt, whole) - _SHOWN // 3, 0)
                raise InputError(
                    f"{name}: the prompt of use ends with {_end(prompt[start:])!r}, but the chat "
                    f"template's training text goes on with {_end(whole[start:])!r} there; set "
                    "data.template to one whose training text begins with its prompt, or fix or "
                    "remove the row."
                )
            self._check_shown(messages[:i], prompt, name)
            rest = whole[len(prompt) :]
            marks = [(a - len(prompt), b - len(prompt)) for a, b in marks if len(prompt) < b > a]
            if self._marks and not marks:
                continue
            self._check(messages[i].content, rest, marks, name)
            found.append(_Turn(prompt, whole, name))
        if not found:
            raise InputError(
                f"{where}: the chat template yields no assistant token, so there is nothing to "
                "learn; set data.template, or fix the row."
            )
        return found

    def _check_shown(self, given: Sequence[Message], prompt: str, name: str) -> None:
        """Refuse a prompt that leaves out what the system or a user says."""
        for message in given:
            if message.role != "assistant" and message.content.strip() not in prompt:
                raise InputError(
                    f"{name}: the chat template changes or drops what the {message.role} says: the "
                    f"row says {_end(message.content)!r}, the prompt of use is {_end(prompt)!r}; "
                    "set data.template to one that shows it, or fix the row."
                )

    def _check(self, content: str, rest: str, marks: list[tuple[int, int]], name: str) -> None:
        """Refuse an answer that the template alters, marks in part, or that has its own end."""
        body = rest.removesuffix(self._closing)
        if not _shows(body, content):
            raise InputError(
                f"{name}: the chat template changes or drops the assistant's text: the row says "
                f"{_end(content)!r}, the template {_end(rest)!r}; set data.template to one that "
                "keeps it, or fix the row."
            )
        for text in self.stop_texts():
            if text in content:
                raise InputError(
                    f"{name}: the answer contains {text!r}, at which generation stops; remove it, "
                    "or the row."
                )
        unmarked, at = "", 0
        for start, stop in [*marks, (len(body), len(body))] if self._marks else []:
            unmarked += body[at : max(start, at)]
            at = max(at, stop)
        if unmarked.strip():
            raise InputError(
                f"{name}: the chat template leaves {_end(unmarked)!r} of {_end(body)!r} out of "
                "{% generation %}, but a model has to write it; fix the template, or set "
                "data.template to another."
            )

    def _sequences(
        self, turns: Sequence[_Turn], ids: Iterator[list[int]]
    ) -> list[Encoded] | InputError:
        """One sequence for all turns, and one for each that is shown otherwise in it."""
        tokens = [(turn, next(ids), next(ids)) for turn in turns]
        try:
            spans = [self._span(*given) for given in tokens]
        except InputError as error:
            return error
        found: list[Encoded] = []
        for own, start, end in reversed(spans):
            for whole, loss_mask in found:
                if whole[:end] == own[:end]:
                    stop = len(own) if whole[: len(own)] == own else end
                    loss_mask[start:stop] = [True] * (stop - start)
                    break
            else:
                found.append((own, [False] * start + [True] * (len(own) - start)))
        return found[::-1]

    def _span(
        self, turn: _Turn, prompt_ids: list[int], whole_ids: list[int]
    ) -> tuple[list[int], int, int]:
        """Token ids up to the end of a turn, where its answer begins, and where it has ended.

        The last two differ from the sequence's length by white space after the token that ends the
        turn, which is trained on too (as in the official code).
        """
        prompt, ids = self._begun(prompt_ids), self._begun(whole_ids)
        if ids[: len(prompt)] != prompt:
            ids = [*prompt, *self._continued(turn, prompt, ids)]
        start = len(prompt)
        end = next((i + 1 for i in range(start, len(ids)) if ids[i] in self._stops), 0)
        if not end:  # a turn that ends otherwise than the template's other turns, or not at all
            end = len(ids)
            while end > start and self._blank(ids[end - 1]):
                end -= 1
            if end == start or ids[end - 1] not in self._special:
                ids = [*ids, self.tokenizer.eos_token_id]
                end = len(ids)
        stop = end
        while stop < len(ids) and self._blank(ids[stop]):
            stop += 1
        return ids[:stop], start, end

    def _continued(self, turn: _Turn, prompt: list[int], joined: list[int]) -> list[int]:
        """The ids of an answer after its prompt, where the tokenizer would join the two.

        As where an answer begins with a newline and the prompt ends with one: a model is given the
        prompt's own tokens, so it is these that the sequence begins with.
        """
        rest = turn.whole[len(turn.prompt) :]
        for before in ("", "\n"):  # a text's first word is otherwise given a space by some
            head, ids = self._ids([before, before + rest])
            ids, same = ids[len(head) :], ids[: len(head)] == head
            if same and self._text([*prompt, *ids]) == self._text(joined):
                return ids
        start = _common(prompt, joined)
        tails = [self.tokenizer.convert_ids_to_tokens(ids[start:][:8]) for ids in (prompt, joined)]
        raise InputError(
            f"{turn.name}: the tokens of the prompt end with {tails[0]}, but together with the "
            f"answer they become {tails[1]}; take the white space from the beginning of the "
            "answer, or from the end of the template's generation prompt."
        )

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _blank(self, token: int) -> bool:
        return token not in self._special and not self._text([token]).strip()


def _shows(text: str, content: str) -> bool:
    """Whether the text contains everything that is said, thoughts included."""
    at = 0
    for part in _THOUGHT.split(content):
        at = text.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return True


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The length of the common beginning of two sequences."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _end(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} … {text[-_SHOWN:]}"
