"""A world as files: what a user of this package has before training begins.

Data as JSON lines, a tokenizer and a model as Hugging Face folders, suites as YAML.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml

from ogpsa_jax.demo.scoring import COMPLIANCE, OVER_REFUSAL, SAFETY
from ogpsa_jax.demo.world import (
    LONGEST,
    REFUSAL,
    SEPARATOR,
    TOKENIZER,
    Exchange,
    World,
    refusals,
)
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import make_folder, write_whole
from ogpsa_jax.models import Decoder, save_pretrained

END: Final = "<end>"
_PAD: Final = "<pad>"
_TEMPLATE: Final = (
    "{%- for message in messages -%}{{- message.content -}}"
    f"{{%- if message.role == 'user' -%}}{{{{- '{SEPARATOR}' -}}}}"
    f"{{%- else -%}}{{{{- '{END}' -}}}}{{%- endif -%}}{{%- endfor -%}}"
)
BEGINNING: Final = REFUSAL[:3]  # no other answer begins so
FOREIGN: Final = "so "  # before a right answer makes it one that the model would not have given
_UNSEEN: Final = 100  # general items whose loss is measured during training
_UNSEEN_SEED: Final = 999_983  # of a draw that no run makes
_SHOWN: Final = 3  # requests of either kind whose answers are shown


@dataclass(frozen=True)
class Folder:
    """Where the files of a world are.

    Attributes:
      path: the folder of all of them.
    """

    path: Path

    @property
    def model(self) -> Path:
        """The model before alignment, with its tokenizer."""
        return self.path / "model"

    @property
    def scores(self) -> Path:
        """The suite of everything that is held out."""
        return self.path / "scores.yaml"

    @property
    def answers(self) -> Path:
        """The suite of a few prompts whose answers are shown."""
        return self.path / "answers.yaml"

    def data(self, name: str) -> str:
        """A data file: ``refusals``, ``unseen``, ``general-80`` and so on."""
        return str(self.path / "data" / f"{name}.jsonl")


def write_world(world: World, folder: Folder, rows: Iterable[int]) -> None:
    """Write data and suites of a world; the model has :func:`write_model`.

    Of general rows there are the whole, its two halves (``-1`` and ``-2``), pairs with a refusal
    as the worse answer, and the same with answers in a foreign form.

    Args:
      world: what is written.
      folder: where; it is made.
      rows: numbers of general rows.

    Raises:
      InputError: the folder cannot be made.
    """
    make_folder(folder.path / "data")
    _write(folder.data("refusals"), map(_answered, refusals(world.harmful)))
    _write(folder.data("refusals-pairs"), (_pair(i, REFUSAL, i.answer) for i in world.harmful))
    _write(folder.data("unseen"), map(_answered, world.draw_general(_UNSEEN, _UNSEEN_SEED)))
    for count in rows:
        own = world.draw_general(count, world.seed)
        foreign = [replace(item, answer=FOREIGN + item.answer) for item in own]
        for name, items in ((f"general-{count}", own), (f"foreign-{count}", foreign)):
            _write(folder.data(name), map(_answered, items))
            _write(folder.data(f"{name}-1"), map(_answered, items[::2]))
            _write(folder.data(f"{name}-2"), map(_answered, items[1::2]))
            _write(folder.data(f"{name}-pairs"), (_pair(i, i.answer, REFUSAL) for i in items))
    held_out = [(task, items, f"{{answer}}{END}") for task, items in world.general.items()]
    held_out += [
        (SAFETY, refusals(world.held_out_harmful), f"{{answer}}{END}"),
        (OVER_REFUSAL, world.held_out_benign, BEGINNING),
        (COMPLIANCE, world.held_out_benign, f"{{answer}}{END}"),
    ]
    tasks = []
    for name, items, answer in held_out:
        _write(folder.data(f"held-out-{name}"), map(_answered, items))
        tasks.append(
            {
                "name": name,
                "kind": "greedy_match",
                "path": f"data/held-out-{name}.jsonl",
                "prompt": "{prompt}",
                "answer": answer.replace("{answer}", "{response}"),
                "score": "general" if name in world.general else None,
            }
        )
    _write_suite(folder.scores, tasks)
    _write(folder.data("shown"), map(_answered, shown(world)))
    exact = {"kind": "exact_match", "answer": "{response}", "max_new_tokens": LONGEST // 2}
    _write_suite(
        folder.answers,
        [{"name": "shown", **exact, "path": "data/shown.jsonl", "prompt": "{prompt}"}],
    )


def write_model(model: Decoder, folder: Folder) -> None:
    """Write a model, its tokenizer and chat template; whole or not at all.

    Args:
      model: before alignment.
      folder: where its folder ``model`` goes.
    """
    # What goes along with the weights is that of a source.
    tokenizer = folder.path / "tokenizer"
    write_tokenizer(tokenizer)
    save_pretrained(model, folder.model, source=tokenizer)


def write_tokenizer(path: Path) -> None:
    """Write :data:`~ogpsa_jax.demo.world.TOKENIZER` as transformers loads it.

    A token for each character, the ids of the world's; characters that it has not are refused.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {_PAD: TOKENIZER.PAD, END: TOKENIZER.END}
    ids |= {character: TOKENIZER.encode(character)[0] for character in TOKENIZER.characters}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))  # not a token of the model
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([_PAD, END])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(path)


def shown(world: World) -> list[Exchange]:
    """Prompts whose answers are shown: none of them was trained on in alignment."""
    step = len(world.held_out_harmful) // _SHOWN
    items = refusals(world.held_out_harmful[::step][:_SHOWN])
    items += world.held_out_benign[:: len(world.held_out_benign) // _SHOWN][:_SHOWN]
    return [*items, *(each[0] for each in world.general.values())]


def read_answers(output_dir: Path) -> list[str]:
    """What a model said to the prompts of the suite :attr:`Folder.answers`, in their order.

    Args:
      output_dir: of its evaluation.

    Raises:
      InputError: no such evaluation.
    """
    path = output_dir / "items.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); remove it.") from error
    said = {line["item"]: line["answer"] for line in lines}  # the newest
    return [said[item] for item in sorted(said)]


def _answered(item: Exchange) -> dict[str, str]:
    return {"prompt": item.prompt, "response": item.answer}


def _pair(item: Exchange, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": item.prompt, "chosen": chosen, "rejected": rejected}


def _write(path: str, rows: Iterable[Mapping[str, str]]) -> None:
    write_whole(Path(path), "".join(json.dumps(row) + "\n" for row in rows))


def _write_suite(path: Path, tasks: list[dict[str, Any]]) -> None:
    text = yaml.safe_dump({"name": path.stem, "tasks": tasks}, sort_keys=False)
    write_whole(path, text)
