import json
import random
from pathlib import Path

import pytest

from ogpsa_jax.evaluation.language_model import open_model

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval, datasets and torch warn on their own

_TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}} Answer:"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "local_generation": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["k", "qu"], max_gen_toks: 16}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    """Harness tasks on a local file of random items."""
    seed = random.randrange(2**32)
    print(f"items: seed {seed}")
    draw = random.Random(seed)

    def words(least, most):
        letters = "abcdefghijklmnopqrstuvwxyz"
        count = draw.randint(least, most)
        return " ".join("".join(draw.choices(letters, k=draw.randint(1, 7))) for _ in range(count))

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": words(2, 9),
            "choices": [words(1, 3) for _ in range(3)],
            "label": draw.randrange(3),
            # Some longer than the model's 512 positions: several windows.
            "text": words(3, 30) if i % 5 else words(180, 220),
        }
        for i in range(12)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in _TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / 'items.jsonl'}}}}}\n"
            f"test_split: test\n{text}"
        )
    return folder


def _run(model, folder: Path, **options):
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model=model,
        tasks=list(_TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )


def test_every_response_equals_that_of_the_harness_torch_backend(
    tiny_folder, local_tasks, monkeypatch, tmp_path
):
    from lm_eval.models.huggingface import HFLM

    from ogpsa_jax.evaluation.harness import OgpsaLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    theirs = _run(
        HFLM(pretrained=str(tiny_folder), device="cpu", dtype="float32", batch_size=3), local_tasks
    )
    ours = _run(OgpsaLM(tiny_folder, batch_size=5), local_tasks)
    for task in _TASKS:
        mine, reference = ours["samples"][task], theirs["samples"][task]
        assert len(mine) == len(reference) == 12
        for one, other in zip(mine, reference, strict=True):
            _assert_close(one["resps"], other["resps"])
    for task in _TASKS:
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                # float32 sums over at most 1,500 tokens in another order.
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5, abs=1e-6)
    generated = [sample["resps"][0][0] for sample in ours["samples"]["local_generation"]]
    assert any(generated), "every generation stopped at once: the comparison would show little"
    assert not any("k" in text or "qu" in text for text in generated)


def _assert_close(mine, reference):
    if isinstance(reference, list | tuple):
        assert len(mine) == len(reference)
        for one, other in zip(mine, reference, strict=True):
            _assert_close(one, other)
    elif isinstance(reference, float):
        assert mine == pytest.approx(reference, rel=1e-5, abs=1e-4)
    else:
        assert mine == reference


def test_the_harness_finds_the_model_by_its_name(tiny_folder, local_tasks, monkeypatch, tmp_path):
    import ogpsa_jax.evaluation.harness  # noqa: F401 - registers it

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    results = _run(
        "ogpsa-jax", local_tasks, model_args=f"pretrained={tiny_folder},batch_size=4", limit=2
    )
    assert set(results["results"]) == set(_TASKS)


def test_chat_templates_and_sampling_are_taken_from_the_harness(tiny_folder):
    from lm_eval.api.instance import Instance

    from ogpsa_jax.evaluation.harness import OgpsaLM

    model = OgpsaLM(open_model(tiny_folder), batch_size=2)
    text = model.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert "Hello" in text
    assert len(text) > len("Hello")

    def ask(**settings):
        kwargs = {"max_gen_toks": 12, "until": [], **settings}
        requests = [
            Instance(request_type="generate_until", doc={}, arguments=(text, kwargs), idx=i)
            for i in range(2)
        ]
        return model.generate_until(requests, disable_tqdm=True)

    greedy = ask()
    assert greedy[0] == greedy[1]
    assert ask(do_sample=True, temperature=5.0) != greedy
    with pytest.raises(ValueError, match="num_beams"):
        ask(num_beams=3)
