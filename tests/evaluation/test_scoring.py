import json
import random
import shutil

import numpy as np
import pytest

from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.language_model import ModelOptions, answering_files, open_model
from ogpsa_jax.evaluation.scoring import rolling_windows, score_continuations
from ogpsa_jax.runs import fingerprint


@pytest.fixture(scope="module")
def opened(tiny_folder):
    return open_model(tiny_folder, ModelOptions(mesh=(1, 1, 1), batch_size=3))


def _log_probs(model, row):
    logits = np.asarray(model(np.asarray([row], np.int32)))[0].astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))[:, None]
        - (logits.max(-1, keepdims=True))
    )


def test_log_likelihoods_are_sums_over_the_whole_forward_pass(opened, drawn):
    model, vocab = opened.model, opened.model.config.vocab_size
    pairs = [
        (
            [drawn.randrange(vocab) for _ in range(drawn.randrange(1, 60))],
            [drawn.randrange(vocab) for _ in range(drawn.randrange(1, 20))],
        )
        for _ in range(7)
    ]
    scored = score_continuations(model, pairs, batch_size=3)
    for (context, continuation), found in zip(pairs, scored, strict=True):
        rows = _log_probs(model, context + continuation)
        places = range(len(context) - 1, len(context) + len(continuation) - 1)
        expected = sum(rows[at, token] for at, token in zip(places, continuation, strict=True))
        # float32 logits of size 10, 20 tokens: round-off below 1e-4.
        assert found.total == pytest.approx(expected, abs=1e-4)
        assert found.tokens == len(continuation)
        likeliest = [int(rows[at].argmax()) for at in places]
        assert found.greedy == (likeliest == continuation)


def test_the_likeliest_continuation_is_greedy(opened, drawn):
    from ogpsa_jax.models import generate

    context = [drawn.randrange(3, 250) for _ in range(5)]
    (added,) = generate(opened.model, [context], max_new_tokens=6, stop_tokens=[])
    (found,) = score_continuations(opened.model, [(context, added)])
    assert found.greedy
    (worse,) = score_continuations(opened.model, [(context, [(added[0] + 1) % 250, *added[1:]])])
    assert not worse.greedy
    assert worse.total != found.total


def test_scores_do_not_depend_on_how_pairs_are_batched(opened, drawn):
    pairs = [
        ([drawn.randrange(250) for _ in range(drawn.randrange(1, 90))], [drawn.randrange(250)])
        for _ in range(9)
    ]
    one = score_continuations(opened.model, pairs, batch_size=1)
    many = score_continuations(opened.model, pairs, batch_size=9)
    assert [x.total for x in one] == pytest.approx([x.total for x in many], abs=1e-4)
    counted = []
    score_continuations(opened.model, pairs, batch_size=4, done=counted.append)
    assert counted == [4, 4, 1]


def test_windows_are_those_of_the_harness(drawn):
    utils = pytest.importorskip("lm_eval.utils")
    for _ in range(30):
        length = drawn.randrange(1, 20)
        tokens = [drawn.randrange(1000) for _ in range(drawn.randrange(0, 70))]
        theirs = utils.get_rolling_token_windows(tokens, -1, length, 1)
        expected = [utils.make_disjoint_window(window) for window in theirs]
        mine = rolling_windows(tokens, -1, length)
        assert [(list(a), list(b)) for a, b in expected] == mine
        assert [token for _, part in mine for token in part] == tokens


def test_impossible_pairs_are_named(opened):
    with pytest.raises(ValueError, match=r"pairs\[1\] must have at least one token of context"):
        score_continuations(opened.model, [([1], [2]), ([], [2])])
    with pytest.raises(ValueError, match=r"pairs\[0\] must have a continuation of at most 3"):
        score_continuations(opened.model, [([1], [2] * 4)], max_length=3)
    with pytest.raises(ValueError, match=r"contains the id 999999"):
        score_continuations(opened.model, [([1], [999999])])


def test_a_choice_is_scored_after_its_prompt_and_a_text_whole(opened):
    (plain,) = opened.log_likelihoods([("Once upon a", " time")], chat=False)
    (chat,) = opened.log_likelihoods([("Once upon a", "time")], chat=True)
    assert plain.total != chat.total
    # A space at the end of the prompt belongs to the choice.
    (moved,) = opened.log_likelihoods([("Once upon a ", "time")], chat=False)
    assert moved.total == pytest.approx(plain.total, abs=1e-5)
    (empty,) = opened.log_likelihoods([("", "time")], chat=False)
    (text,) = opened.text_log_likelihoods(["time"])
    assert empty.total == pytest.approx(text.total, abs=1e-5)


def test_a_prompt_that_is_too_long_keeps_its_end_and_is_told(opened, caplog):
    positions = opened.model.config.max_position_embeddings
    prompt = "many words " * positions
    short = opened.encode(prompt, chat=False)[-(positions - 4) :]
    (answer,) = opened.generate([prompt], chat=False, max_new_tokens=4)
    assert (
        answer == opened.generate([opened.tokenizer.decode(short)], chat=False, max_new_tokens=4)[0]
    )
    assert "its end is kept" in caplog.text
    with pytest.raises(InputError, match="leave no room"):
        opened.generate(["a"], chat=False, max_new_tokens=positions)


def test_a_fingerprint_tells_models_and_settings_apart(tiny_folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    files, original = answering_files(copy), answering_files(tiny_folder)
    assert fingerprint(files) == fingerprint(original)
    assert fingerprint(files, "float32") != fingerprint(files, "bfloat16")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-random.randrange(1, 1000)] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert fingerprint(files) != fingerprint(original)


def test_a_mesh_of_more_devices_than_there_are_is_told(tiny_folder):
    with pytest.raises(InputError, match="needs 4096 devices"):
        open_model(tiny_folder, ModelOptions(mesh=(16, 16, 16)))


def test_a_real_model_reaches_its_known_loss(real_data):
    model = open_model(real_data / "data" / "models" / "stories260k", ModelOptions(mesh=(1, 1, 1)))
    text = (real_data / "data" / "models" / "stories260k" / "tinystories_sample.txt").read_text()
    stories = [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    scored = model.text_log_likelihoods(stories)
    loss = -sum(one.total for one in scored) / sum(one.tokens for one in scored)
    # The figure that came with the model, to its three decimals.
    assert loss == pytest.approx(1.266, abs=5e-4)


def test_generation_stops_at_the_ends_of_tokenizer_generation_settings_and_template(
    tiny_folder, tmp_path, monkeypatch
):
    shutil.copytree(tiny_folder, tmp_path / "model")
    settings = tmp_path / "model" / "generation_config.json"
    before = json.loads(settings.read_text()) if settings.exists() else {}
    settings.write_text(json.dumps({**before, "eos_token_id": [5]}))
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ':' + m.content + '<|endoftext|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    opened = open_model(tmp_path / "model", ModelOptions(mesh=(1, 1, 1), template=str(template)))
    ids = opened.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert opened.tokenizer.eos_token_id == ids[1]
    assert set(opened.stop_tokens) == {5, *ids}
    assert {"<|endoftext|>", "<|im_end|>"} < set(opened.stops)
    given = []

    def generate(model, rows, *, stop_tokens, **settings):
        given.append(list(stop_tokens))
        return [[] for _ in rows]

    monkeypatch.setattr("ogpsa_jax.models.generate", generate)
    opened.generate(["a"], chat=True, max_new_tokens=2)
    opened.generate(["a"], chat=False, max_new_tokens=2)
    assert given == [opened.stop_tokens] * 2
    template.write_text(template.read_text() + " ")
    again = open_model(tmp_path / "model", ModelOptions(mesh=(1, 1, 1), template=str(template)))
    assert again.fingerprint != opened.fingerprint
