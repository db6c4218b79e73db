"""Chat templates that come with the package, written from the formats' public descriptions.

Each ends an answer with a token to stop at, and what its prompt says is how its rows begin.
"""

from pathlib import Path
from typing import Any

from ogpsa_jax.errors import InputError

_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
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


def template_source(tokenizer: Any, template: str | None) -> str | None:
    """The Jinja text of a built-in name or a file; of None, the tokenizer's own, if it has one.

    Raises:
      InputError: neither a built-in name nor a readable file.
    """
    if template in BUILT_IN:
        return BUILT_IN[str(template)]
    if template is not None:
        try:
            return Path(template).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"data.template: '{template}' is neither a readable file nor one of "
                f"{', '.join(BUILT_IN)}."
            ) from error
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return str(own).removeprefix("\ufeff") if own else None
