"""The interface of a model that can be evaluated, and the decoders of this package behind it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.thoughts import decoded, opened_thoughts
from ogpsa_jax.runs import fingerprint

if TYPE_CHECKING:
    from ogpsa_jax.evaluation.scoring import LogLikelihood
    from ogpsa_jax.models import Decoder

logger = logging.getLogger(__name__)


class LanguageModel(Protocol):
    """A model that can be evaluated.

    Attributes:
      name: how results call it.
      fingerprint: changes whenever an answer might.
      chats: whether it has a chat template.
      template: the text of that, if any.
      stops: the texts of the tokens at which its answers end.
    """

    name: str
    fingerprint: str
    chats: bool
    template: str | None
    stops: tuple[str, ...]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        chat: bool,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Answers to prompts.

        Args:
          prompts: texts.
          chat: whether each is what a user says in a conversation, or a text to go on with.
          max_new_tokens: of each answer, at most.
          temperature: 0 takes the likeliest token.
          seed: of the sampling; a row's answer also depends on its place in `prompts`.
        """
        ...

    def log_likelihoods(
        self, pairs: Sequence[tuple[str, str]], *, chat: bool
    ) -> "list[LogLikelihood]":
        """How likely continuations are, each given its prompt; `chat` as for :meth:`generate`."""
        ...

    def text_log_likelihoods(self, texts: Sequence[str]) -> "list[LogLikelihood]":
        """How likely whole texts are, in windows of the model's length where they are longer."""
        ...


class JaxModel:
    """A decoder of this package and its tokenizer, as a :class:`LanguageModel`."""

    def __init__(
        self,
        model: "Decoder",
        tokenizer: Any,
        *,
        name: str = "model",
        fingerprint: str = "",
        template: str | None = None,
        batch_size: int = 16,
    ) -> None:
        from ogpsa_jax.data import ChatTemplate

        self.name, self.fingerprint = name, fingerprint
        self.model, self.tokenizer = model, tokenizer
        self.batch_size = batch_size
        self._template = ChatTemplate(tokenizer, template)
        self.template = self._template.source
        self.chats = self.template is not None
        # Of a chat, too, that is spoken to as a base model: its own end is an end there as well.
        ends = {*model.config.eos_token_ids, *self._template.stop_tokens()}
        self.stop_tokens = sorted(ends)
        self.stops = tuple(map(str, tokenizer.convert_ids_to_tokens(self.stop_tokens)))
        self._warned = False

    def render(self, chat_history: Sequence[Mapping[str, str]], *, generation_prompt: bool) -> str:
        """A conversation as text; without a generation prompt, its last turn is left open."""
        return str(
            self.tokenizer.apply_chat_template(
                [dict(turn) for turn in chat_history],
                chat_template=self._template.dated,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                continue_final_message=not generation_prompt,
            )
        )

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt, beginning of text included; never empty."""
        from ogpsa_jax.data import Message

        if chat:
            if not self.chats:
                raise InputError(
                    f"{self.name}: the tokenizer has no chat template; name one with --template, "
                    "or set `chat: false` in the suite."
                )
            return self._template.encode_prompt([Message("user", prompt)])
        return list(self.tokenizer(prompt).input_ids) or [self.prefix_token]

    @property
    def prefix_token(self) -> int:
        """The id that stands before a text: beginning of text, else end of text."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        chat: bool,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """As :meth:`LanguageModel.generate`; of prompts that are too long the end is kept."""
        from ogpsa_jax.models import generate

        room = self.model.config.max_position_embeddings - max_new_tokens
        if room < 1:
            raise InputError(
                f"max_new_tokens: {max_new_tokens} leave no room for a prompt in the model's "
                f"{self.model.config.max_position_embeddings} positions; ask for fewer."
            )
        rows = [self.encode(prompt, chat=chat) for prompt in prompts]
        if not self._warned and any(len(row) > room for row in rows):
            self._warned = True
            logger.warning(
                "%s: a prompt is longer than the %d tokens there is room for; its end is kept",
                self.name,
                room,
            )
        added = generate(
            self.model,
            [row[-room:] for row in rows],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_tokens=self.stop_tokens,
        )
        # Where the template opens the model's thoughts in the prompt, the answer has the marker.
        tails = [str(self.tokenizer.decode(row[-8:])) for row in rows]
        return [
            opened_thoughts(tail) + decoded(self.tokenizer, ids)
            for tail, ids in zip(tails, added, strict=True)
        ]

    def log_likelihoods(
        self, pairs: Sequence[tuple[str, str]], *, chat: bool
    ) -> "list[LogLikelihood]":
        """As :meth:`LanguageModel.log_likelihoods`."""
        from ogpsa_jax.evaluation.scoring import score_continuations

        encoded = [self._encode_pair(*pair, chat=chat) for pair in pairs]
        return score_continuations(self.model, encoded, batch_size=self.batch_size)

    def text_log_likelihoods(self, texts: Sequence[str]) -> "list[LogLikelihood]":
        """As :meth:`LanguageModel.text_log_likelihoods`."""
        from ogpsa_jax.evaluation.scoring import (
            LogLikelihood,
            rolling_windows,
            score_continuations,
        )

        length = self.model.config.max_position_embeddings
        pairs, owners = [], []
        for owner, text in enumerate(texts):
            ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            windows = rolling_windows(ids, self.prefix_token, length)
            pairs += windows
            owners += [owner] * len(windows)
        sums = [LogLikelihood(0.0, 0, True)] * len(texts)
        scored = score_continuations(self.model, pairs, batch_size=self.batch_size)
        for owner, part in zip(owners, scored, strict=True):
            whole = sums[owner]
            sums[owner] = LogLikelihood(
                whole.total + part.total, whole.tokens + part.tokens, whole.greedy and part.greedy
            )
        return sums

    def _encode_pair(
        self, prompt: str, continuation: str, *, chat: bool
    ) -> tuple[list[int], list[int]]:
        if chat:
            ids = self.tokenizer(continuation, add_special_tokens=False).input_ids
            return self.encode(prompt, chat=True), list(ids)
        # A word's space belongs to its token: encode both together, then cut.
        kept = prompt.rstrip()
        context = self.encode(kept, chat=False)
        whole = self.tokenizer(kept + prompt[len(kept) :] + continuation).input_ids
        if not kept:
            whole = [*context, *self.tokenizer(continuation, add_special_tokens=False).input_ids]
        return context, list(whole[len(context) :])


def model_folder(path: str | Path) -> str:
    """The model a path names: the export of a run directory, or what it says.

    Raises:
      InputError: a run that has none.
    """
    export = Path(path) / "export"
    if (export / "config.json").is_file():
        return str(export)
    if (Path(path) / "config.yaml").is_file():
        raise InputError(
            f"{path}: this run has no export yet; let it finish, or write its newest checkpoint "
            f"with `ogpsa-jax export {path} DIR`."
        )
    return str(path)


@dataclass(frozen=True)
class ModelOptions:
    """How a checkpoint is loaded and called.

    Attributes:
      dtype: of computation and weights; ``auto``: float32 on CPU, else bfloat16.
      mesh: devices along the axes data, fsdp and tensor; by default all along fsdp.
      template: chat template, where the tokenizer's own is not the one; built-in name or file.
      batch_size: rows a forward pass.
    """

    dtype: str = "auto"
    mesh: tuple[int, int, int] | None = None
    template: str | None = None
    batch_size: int = 16


def open_model(path: str | Path, options: ModelOptions | None = None) -> JaxModel:
    """A checkpoint as a :class:`LanguageModel`.

    Args:
      path: Hugging Face folder, hub id, or run directory (its export).
      options: how it is loaded and called.

    Raises:
      InputError: no such model, or it is not as it must be; a mesh of more devices than there
        are; or more than one process.
    """
    import jax

    from ogpsa_jax.data import load_tokenizer
    from ogpsa_jax.models import load_pretrained
    from ogpsa_jax.models.config import read_config
    from ogpsa_jax.models.folders import resolve_folder
    from ogpsa_jax.models.pretrained import check_computable

    if jax.process_count() > 1:
        raise InputError(
            f"evaluate: runs in one process, over all its devices; this is one of "
            f"{jax.process_count()} processes."
        )
    options = options or ModelOptions()
    folder, dtype = resolve_folder(model_folder(path)), options.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    check_computable(dtype, "dtype")
    sizes = options.mesh or (1, jax.device_count(), 1)
    devices = sizes[0] * sizes[1] * sizes[2]
    if min(sizes) < 1 or devices > jax.device_count():
        raise InputError(
            f"mesh: data={sizes[0]} fsdp={sizes[1]} tensor={sizes[2]} needs {devices} devices, "
            f"there are {jax.device_count()}."
        )
    placed = None
    if devices > 1:
        automatic = (jax.sharding.AxisType.Auto,) * 3
        placed = jax.make_mesh(
            sizes, ("data", "fsdp", "tensor"), automatic, devices=jax.devices()[:devices]
        )
    read_config(folder)  # so that a mistake in it is not reported as one of the tokenizer
    tokenizer = load_tokenizer(str(folder))
    model = load_pretrained(folder, dtype=dtype, param_dtype=dtype, mesh=placed)
    opened = JaxModel(
        model,
        tokenizer,
        name=str(path),
        template=options.template,
        batch_size=options.batch_size,
    )
    settings = (dtype, opened.template, *opened.stops)
    opened.fingerprint = fingerprint(answering_files(folder), *settings)
    return opened


def answering_files(folder: Path) -> list[Path]:
    """The files of a model folder that an answer depends on."""
    kinds = (".safetensors", ".json", ".jinja", ".model")
    return [file for file in sorted(folder.iterdir()) if file.suffix in kinds]
