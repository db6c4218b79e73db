"""Chat templates, and which of the rendered tokens are the assistant's.

The tokenizer's own template is used unless another is named. The assistant's tokens are found
whether or not the template marks them with ``{% generation %}``: what a template adds after an
answer (its end token) is learnt with it, so that a model learns to stop.
"""

from pathlib import Path
from typing import Any

import jinja2

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
        "{{ bos_token + '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}"
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


def load_tokenizer(path: str) -> Any:
    """A fast tokenizer from a local folder or a hub id; nothing of it is executed.

    Raises:
      InputError: no tokenizer there, or not a fast one.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"{path}: no tokenizer could be loaded ({reason}).") from error
    if not tokenizer.is_fast:
        raise InputError(f"{path}: the tokenizer has no tokenizer.json; convert it to a fast one.")
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{path}: the tokenizer has no eos_token, so no model could learn to stop."
        )
    return tokenizer


class ChatTemplate:
    """Renders conversations and finds the assistant's part in them."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.source = _template_source(tokenizer, template)
        self._marks = "{% generation" in self.source or "{%- generation" in self.source
        probe = [Message("user", "a"), Message("assistant", _PROBE)]
        _, found, self._tail = self.render(probe).partition(_PROBE)
        if not found:
            raise InputError("template: it does not show what the assistant says; choose another.")

    def render(self, messages: list[Message], *, generation_prompt: bool = False) -> str:
        """The conversation as text."""
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    turns,
                    chat_template=self.source,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                )
            )
        except jinja2.TemplateError as error:
            raise InputError(f"template: it cannot render a conversation ({error}).") from error

    def encode(self, messages: list[Message], where: str) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them are to be learnt.

        Raises:
          InputError: the template yields no assistant token for this row.
        """
        if self._marks:
            ids, learnt = self._encode_marked(messages)
        else:
            ids, learnt = self._encode_located(messages, where)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and self._adds_bos():
            ids, learnt = [bos, *ids], [False, *learnt]
        if not any(learnt):
            raise InputError(
                f"{where}: the chat template yields no assistant token, so there is nothing to "
                "learn; set data.template, or mend the row."
            )
        last = max(i for i, flag in enumerate(learnt) if flag)
        stops = set(self.tokenizer.all_special_ids)
        answer_end = [i for i in range(len(ids)) if learnt[i] and ids[i] in stops]
        if not answer_end or answer_end[-1] < last - 2:  # a newline may follow the end token
            ids = [*ids[: last + 1], self.tokenizer.eos_token_id]
            learnt = [*learnt[: last + 1], True]
        return ids, learnt

    def encode_prompt(self, messages: list[Message]) -> list[int]:
        """Token ids up to where the assistant starts to speak."""
        text = self.render(messages, generation_prompt=True)
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and self._adds_bos():
            ids = [bos, *ids]
        return ids

    def _adds_bos(self) -> bool:
        return bool(self.tokenizer("a").input_ids[:1] == [self.tokenizer.bos_token_id])

    def _encode_marked(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            chat_template=self.source,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]

    def _encode_located(self, messages: list[Message], where: str) -> tuple[list[int], list[bool]]:
        text = self.render(messages)
        spans, cursor = [], 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self.render(messages[:i], generation_prompt=True)
            start = len(before) if text.startswith(before) else cursor
            for said in (message.content, message.content.strip(), _after_thought(message.content)):
                at = text.find(said, start) if said else -1
                if at >= 0:
                    break
            else:
                raise InputError(
                    f"{where}: the chat template changes or drops the assistant's text; set "
                    "data.template to one that keeps it."
                )
            # A space the template puts before the answer belongs to it: the model must say it.
            start = at if not text.startswith(before) or text[start:at].strip() else start
            cursor = at + len(said)
            if text.startswith(self._tail, cursor):
                cursor += len(self._tail)
            spans.append((start, cursor))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learnt = [
            any(start <= first and first < stop and last > first for start, stop in spans)
            for first, last in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), learnt


def _after_thought(content: str) -> str:
    """What is left of an answer where a template drops the reasoning before it."""
    return content.rpartition("</think>")[2].strip()


def _template_source(tokenizer: Any, template: str | None) -> str:
    if template in BUILT_IN:
        return BUILT_IN[str(template)]
    if template is not None:
        path = Path(template)
        if not path.is_file():
            raise InputError(
                f"data.template: '{template}' is neither a file nor one of {', '.join(BUILT_IN)}."
            )
        return path.read_text(encoding="utf-8")
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; set data.template to a "
            f"jinja file or one of {', '.join(BUILT_IN)}."
        )
    return str(own)
