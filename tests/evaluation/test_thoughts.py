import itertools
import re
import types

import pytest

from ogpsa_jax.evaluation.items import Item
from ogpsa_jax.evaluation.language_model import JaxModel
from ogpsa_jax.evaluation.suite import ExactMatchTask
from ogpsa_jax.evaluation.tasks import run_items, summarise
from ogpsa_jax.evaluation.thoughts import (
    decoded,
    marks_thoughts,
    only_thoughts,
    opened_thoughts,
    without_thoughts,
)

_MARKERS = [
    ("<think>", "</think>"),
    ("<THINK>", "</THINK>"),
    ("<thinking>\n", "\n</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|><|begin_of_solution|>"),
    ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel>thought\n", "<channel|>"),
]


@pytest.mark.parametrize("opening, closing", _MARKERS)
def test_thoughts_of_every_family_are_no_part_of_the_answer(opening, closing):
    thought = "I can't do this.\nOr can I?"
    assert without_thoughts(f"{opening}{thought}{closing}\n\nThe answer.") == "The answer."
    assert (
        without_thoughts(f"{thought}{closing}The answer.") == "The answer."
    )  # begun in the prompt
    for cut in (opening, opening + thought, opening + thought + closing):
        assert without_thoughts(cut) == ""
        assert only_thoughts(cut)
    assert not only_thoughts(f"{opening}{thought}{closing}The answer.")


def test_thoughts_amid_an_answer_are_cut_out_and_nested_ones_end_once():
    assert without_thoughts("One. <think>hm</think>Two.") == "One. Two."
    assert without_thoughts("<think>a<think>b</think>c</think>d") == "d"
    assert without_thoughts("<think>a</think>b<think>c") == "b"


def test_a_channel_whose_special_tokens_were_dropped_is_known_by_its_names():
    assert without_thoughts("analysisWe must refuse.assistantfinalNo, I won't.") == "No, I won't."
    assert without_thoughts("analysisWe must refuse. But") == ""
    assert without_thoughts("analysis of the data shows") == "analysis of the data shows"


@pytest.mark.parametrize(
    "answer", ["", "  \n", "I think.", "a < b > c", "[thinking cap]", "<p>x</p>"]
)
def test_an_answer_without_thoughts_stays_as_it_is(answer):
    assert without_thoughts(answer) == answer
    assert not only_thoughts(answer)


def test_a_template_that_opens_the_thoughts_is_seen():
    assert opened_thoughts("<|assistant|><think>\n") == "<think>\n"
    assert opened_thoughts("<|assistant|><think>\n\n</think>\n\n") == ""
    assert opened_thoughts("What is <think>?") == ""


class _Tokenizer:
    """Words are tokens; `special` ones are dropped by ordinary decoding."""

    def __init__(self, special):
        self.words = [*special, *"abcdefgh"]
        self.all_special_ids = list(range(len(special)))

    def convert_ids_to_tokens(self, ids):
        return self.words[ids] if isinstance(ids, int) else [self.words[i] for i in ids]

    def decode(self, ids, skip_special_tokens=False):
        dropped = self.all_special_ids if skip_special_tokens else []
        return "".join(self.words[i] for i in ids if i not in dropped)


def test_markers_that_are_special_tokens_are_kept_and_other_special_tokens_are_not(drawn):
    special = ["<s>", "</s>", "[THINK]", "[/THINK]", "<|im_end|>", "<|channel|>", "<|message|>"]
    tokenizer = _Tokenizer(special)
    ids = drawn.choices(range(len(tokenizer.words)), k=30)
    text = decoded(tokenizer, ids)
    kept = [i for i in ids if i >= len(special) or special[i] not in ("<s>", "</s>", "<|im_end|>")]
    assert text == tokenizer.decode(kept)
    assert [word for word in special if marks_thoughts(word)] == [*special[2:4], *special[5:]]


@pytest.mark.parametrize(
    "tail, said, answer",
    [
        ("<think>\n", "aaa", ""),  # cut within the thoughts that the template began
        ("<think>\n", "aa</think>b", "b"),
        ("<think>\n\n</think>\n\n", "ab", "ab"),
        ("", "<think>a</think>b", "b"),
    ],
)
def test_thoughts_that_the_template_begins_are_told_as_thoughts(tail, said, answer, monkeypatch):
    class Words(_Tokenizer):
        chat_template, added_tokens_decoder = None, {}
        bos_token_id = eos_token_id = 0

        def __call__(self, text):
            return types.SimpleNamespace(input_ids=self.cut(text))

        def cut(self, text):
            return [self.words.index(word) for word in re.findall(r"</?think>|.", text, re.S)]

    tokenizer = Words(["<s>", "<think>", "</think>"])
    tokenizer.words += ["\n"]
    config = types.SimpleNamespace(max_position_embeddings=64, eos_token_ids=())
    model = JaxModel(types.SimpleNamespace(config=config), tokenizer)
    monkeypatch.setattr(
        "ogpsa_jax.models.generate", lambda model, rows, **settings: [tokenizer.cut(said)]
    )
    (written,) = model.generate(["abc" + tail], chat=False, max_new_tokens=8)
    assert without_thoughts(written) == answer


class _Thinker:
    name, chats, fingerprint = "thinker", False, "1"

    def generate(self, prompts, **settings):
        return list(
            itertools.islice(itertools.cycle(["<think>7?</think>5", "<think>5"]), len(prompts))
        )


def test_an_answer_is_matched_without_its_thoughts():
    task = ExactMatchTask(name="t", kind="exact_match", path="x", extract=r"\d")
    items = [Item(i, "2+3", expected="5") for i in (1, 2)]
    outcomes = run_items(_Thinker(), task, items, False, 0)
    assert [outcome["correct"] for outcome in outcomes] == [True, False]
    result = summarise(task, outcomes)
    assert result.value == 0.5
    assert result.details["only_thoughts"] == 0.5
