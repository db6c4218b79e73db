"""Tokenizers from Hugging Face folders."""

from typing import Any

from ogpsa_jax.errors import InputError


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
