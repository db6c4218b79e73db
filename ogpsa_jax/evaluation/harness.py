"""The decoders of this package as a model of lm-evaluation-harness, so that all its tasks run.

    import lm_eval
    from ogpsa_jax.evaluation.harness import OgpsaLM

    lm_eval.simple_evaluate(model=OgpsaLM("runs/sft"), tasks=["arc_easy"])

Importing this module also registers it under the name ``ogpsa-jax``; ``python -m`` with it is the
harness's own command, as in ``... run --model ogpsa-jax --model_args pretrained=runs/sft``.
Encoding, truncation, windows and stop sequences are those of the harness's own ``hf`` model, so
that scores agree with it.
Needs ``lm-eval``, which needs torch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from ogpsa_jax.evaluation.language_model import JaxModel, ModelOptions, open_model
from ogpsa_jax.evaluation.scoring import score_continuations
from ogpsa_jax.models import generate
from ogpsa_jax.progress import Progress

_SAMPLING = {"temperature", "top_k", "top_p"}


@register_model("ogpsa-jax")
class OgpsaLM(TemplateLM):  # type: ignore[misc]
    """A decoder for lm-evaluation-harness.

    Args:
      pretrained: Hugging Face folder, hub id, run directory, or an opened model.
      batch_size: rows a forward pass.
      max_length: longest input, in tokens; by default the model's ``max_position_embeddings``.
      dtype: of computation and weights; ``auto``: float32 on CPU, else bfloat16.
      seed: of sampling, for tasks that sample.
      **unused: what the harness passes to every model (device, for one).
    """

    def __init__(
        self,
        pretrained: str | Path | JaxModel,
        *,
        batch_size: int | str = 16,
        max_length: int | None = None,
        dtype: str = "auto",
        seed: int = 0,
        **unused: Any,
    ) -> None:
        super().__init__()
        if str(batch_size).split(":")[0] == "auto":
            batch_size = 16
        if isinstance(pretrained, JaxModel):
            opened = pretrained
        else:
            opened = open_model(pretrained, ModelOptions(dtype=dtype, batch_size=int(batch_size)))
        self.opened = opened
        self.tokenizer = opened.tokenizer
        self.batch_size = int(batch_size)
        self.seed = seed
        self.max_length = int(max_length or opened.model.config.max_position_embeddings)
        self._texts: list[str] | None = None

    @property
    def eot_token_id(self) -> int:
        """Id of the end of a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text without context."""
        return self.opened.prefix_token

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task does not say how many."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Token ids of a text; a beginning of text that it already contains is not doubled."""
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode([self.prefix_token_id])
        ):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text."""
        return self.opened.render(chat_history, generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of each (texts, context ids, continuation ids)."""
        scored = self._score([(context, answer) for _, context, answer in requests], disable_tqdm)
        results = []
        for (texts, _, _), (total, greedy) in zip(requests, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, (total, greedy))
            results.append((total, greedy))
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's length."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(utils.make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to a stop sequence."""
        results = [""] * len(requests)
        with Progress(shown=not disable_tqdm) as bars:
            bar = bars.bar("generate_until", len(requests), "requests")
            for settings, numbers in _grouped(requests):
                kwargs = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
                eos = self.tokenizer.decode([self.eot_token_id])
                until = handle_stop_sequences(kwargs.pop("until"), eos=eos)
                contexts = {i: str(requests[i].args[0]) for i in numbers}
                for i, text in self._generate(contexts, until, kwargs):
                    results[i] = postprocess_generated_text(text, until, None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, results[i])
                    bar.more(1)
        return results

    def _generate(
        self, contexts: dict[int, str], until: list[str], kwargs: dict[str, Any]
    ) -> Iterator[tuple[int, str]]:
        """What is added to contexts, under their numbers, in batches of like length."""
        new_tokens = int(kwargs.pop("max_gen_toks"))
        room = self.max_length - new_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks must be less than max_length ({self.max_length}), got {new_tokens}"
            )
        sampling, stops = self._sampling(kwargs), self._stop_tokens(until)
        rows = {i: self.tok_encode(text)[-room:] for i, text in contexts.items()}
        order = sorted(rows, key=lambda i: -len(rows[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            added = generate(
                self.opened.model,
                [rows[i] or [self.prefix_token_id] for i in batch],
                max_new_tokens=new_tokens,
                stop_tokens=stops,
                seed=self.seed + start,
                **sampling,
            )
            for i, ids in zip(batch, added, strict=True):
                yield i, str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        with Progress(shown=not disable_tqdm) as bars:
            scored = score_continuations(
                self.opened.model,
                pairs,
                batch_size=self.batch_size,
                max_length=self.max_length,
                done=bars.bar("log-likelihood", len(pairs), "requests").more,
            )
        return [(one.total, one.greedy) for one in scored]

    def _sampling(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        sampled = kwargs.pop("do_sample", False)
        unknown = kwargs.keys() - _SAMPLING
        if unknown:
            raise ValueError(
                f"generation_kwargs must be among do_sample, until, max_gen_toks, "
                f"{', '.join(sorted(_SAMPLING))}, got {', '.join(sorted(unknown))}"
            )
        return {**kwargs, "temperature": kwargs.get("temperature", 1.0)} if sampled else {}

    def _stop_tokens(self, until: Sequence[str]) -> list[int]:
        """End of text, and every token whose text contains a stop sequence: decoding may end there.

        A stop sequence that came in several tokens is cut off afterwards.
        """
        if self._texts is None:
            ids = [[i] for i in range(self.opened.model.config.vocab_size)]
            self._texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        found = {*self.opened.stop_tokens}
        for stop in until:
            found |= {i for i, text in enumerate(self._texts) if stop and stop in text}
        return np.unique(list(found)).tolist()


def _grouped(requests: Sequence[Instance]) -> list[tuple[dict[str, Any], list[int]]]:
    """Requests of the same generation settings go together."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for i, request in enumerate(requests):
        settings = request.args[1]
        groups.setdefault(repr(settings), (settings, []))[1].append(i)
    return list(groups.values())


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
