import json
import re
from pathlib import Path

import pytest

from ogpsa_jax.cli import main
from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.items import read_items
from ogpsa_jax.evaluation.suite import load_suite

SUITES = Path(__file__).resolve().parents[2] / "configs" / "suites"


def _suite(folder: Path, tasks: str, rest: str = ""):
    path = folder / "suite.yaml"
    path.write_text(f"name: trial\n{rest}tasks:\n{tasks}")
    return load_suite(path)


def _items(folder: Path, task: str):
    suite = _suite(folder, f"  - {{name: t, {task}}}\n")
    return read_items(suite, suite.tasks[0])


def test_prompts_are_read_from_every_layout(tmp_path):
    files = {
        "a.csv": 'id,prompts_final\n1,"How, then?"\n2,"Two\nlines"\n',
        "b.jsonl": '{"question": "How, then?"}\n\n{"question": "Two\\nlines"}\n',
        "c.json": '[{"prompt": "How, then?"}, {"prompt": "Two\\nlines"}]',
        "d.json": '{"instructions": ["How, then?", "Two\\nlines"]}',
        "e.json": '{"Behavior": "How, then?"}\n{"Behavior": "Two\\nlines"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        items = _items(tmp_path, f"kind: refusal, path: {name}")
        assert [item.prompt for item in items] == ["How, then?", "Two\nlines"], name
        assert [item.id for item in items] == [1, 2]
    (tmp_path / "f.txt").write_text("How, then?\n\nAnother line\n")
    items = _items(tmp_path, "kind: refusal, path: f.txt")
    assert [item.prompt for item in items] == ["How, then?", "Another line"]


@pytest.mark.parametrize("columns", ["type", "label"])
def test_of_the_layout_of_xstest_each_kind_takes_its_own_side(tmp_path, columns):
    header = {"type": "prompt,type", "label": "prompt,label"}[columns]
    safe, unsafe = {"type": ("homonyms", "contrast_homonyms"), "label": ("safe", "unsafe")}[columns]
    (tmp_path / "x.csv").write_text(f"{header}\nkill a process,{safe}\nkill a man,{unsafe}\n")
    harmful = _items(tmp_path, "kind: refusal, path: x.csv")
    harmless = _items(tmp_path, "kind: over_refusal, path: x.csv")
    assert [item.prompt for item in harmful] == ["kill a man"]
    assert [item.prompt for item in harmless] == ["kill a process"]


def test_a_type_that_is_not_xstests_filters_nothing(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,type\none,standard\ntwo,other\n")
    assert len(_items(tmp_path, "kind: refusal, path: x.csv")) == 2


def test_a_limit_draws_the_same_items_for_the_same_seed(tmp_path, drawn):
    (tmp_path / "x.txt").write_text("\n".join(f"prompt {i}" for i in range(200)))
    seed = drawn.randrange(1000)

    def ids(**settings):
        text = ", ".join(f"{key}: {value}" for key, value in settings.items())
        return [item.id for item in _items(tmp_path, f"kind: refusal, path: x.txt, {text}")]

    first = ids(limit=30, seed=seed)
    assert len(first) == 30
    assert first == sorted(first)
    assert ids(limit=30, seed=seed) == first
    assert ids(limit=30, seed=seed + 1) != first
    assert set(first) < set(ids(limit=60, seed=seed))  # more items: the same and further ones


def test_where_keeps_the_rows_with_these_values(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,kind\none,a\ntwo,b\n")
    items = _items(tmp_path, "kind: refusal, path: x.csv, where: {kind: b}")
    assert [item.prompt for item in items] == ["two"]
    with pytest.raises(InputError, match="no field 'kinds'"):
        _items(tmp_path, "kind: refusal, path: x.csv, where: {kinds: b}")
    with pytest.raises(InputError, match="finds no row"):
        _items(tmp_path, "kind: refusal, path: x.csv, where: {kind: c}")


def test_expected_answers_are_extracted(tmp_path):
    row = {"question": "2+2?", "answer": "4 by counting\n#### 1,004"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    task = (
        "kind: exact_match, path: x.jsonl, prompt: 'Q: {question}', extract_expected: '#### (.*)'"
    )
    (item,) = _items(tmp_path, task)
    assert (item.prompt, item.expected) == ("Q: 2+2?", "1,004")
    with pytest.raises(InputError, match=r"row 1: `extract_expected` .* finds nothing"):
        _items(tmp_path, task.replace("####", "%%%%"))


@pytest.mark.parametrize("answer", [1, "1", "B", "b", "blue"])
def test_the_right_choice_is_a_number_a_letter_or_the_choice(tmp_path, answer):
    row = {"q": "Sky?", "choices": ["red", "blue"], "answer": answer}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (item,) = _items(tmp_path, "kind: multiple_choice, path: x.jsonl, prompt: '{q}'")
    assert item.choices == ("red", "blue")
    assert item.right == 1


@pytest.mark.parametrize("answer", [2, "C", "green", None])
def test_a_right_choice_that_is_none_is_told(tmp_path, answer):
    row = {"q": "Sky?", "choices": ["red", "blue"], "answer": answer}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="row 1: field 'answer' must be"):
        _items(tmp_path, "kind: multiple_choice, path: x.jsonl, prompt: '{q}'")


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["4", "2", "1", "0"], 1, 1),  # a number is a number, whatever the choices say
        (["C", "B", "A"], 2, 2),
        ({"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]}, "3", 2),
        ({"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]}, "4", 3),
        ({"text": ["C", "B", "A"], "label": ["A", "B", "C"]}, "A", 0),
        (["zero", "1"], "1", 1),  # both readings agree
    ],
)
def test_numbers_labels_and_texts_are_not_taken_for_one_another(tmp_path, choices, answer, right):
    row = {"q": "Which?", "choices": choices, "answer": answer}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    (item,) = _items(tmp_path, "kind: multiple_choice, path: x.jsonl, prompt: '{q}'")
    assert item.right == right


@pytest.mark.parametrize("answer", ["1", "²", "ß", "9" * 5000])
def test_a_right_choice_of_two_meanings_or_none_is_told(tmp_path, answer):
    row = {"q": "Which?", "choices": ["1", "2"], "answer": answer}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="row 1: field 'answer'"):
        _items(tmp_path, "kind: multiple_choice, path: x.jsonl, prompt: '{q}'")


def test_documents_of_a_text_file_are_split_where_asked(tmp_path):
    (tmp_path / "x.txt").write_text("\nOne\ntext\n<end>\nAnother\n<end>\n")
    whole = _items(tmp_path, "kind: perplexity, path: x.txt")
    assert [item.prompt for item in whole] == ["\nOne\ntext\n<end>\nAnother\n<end>\n"]
    parts = _items(tmp_path, "kind: perplexity, path: x.txt, separator: <end>")
    assert [item.prompt for item in parts] == ["One\ntext", "Another"]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("  - {name: a, kind: refusal, path: x.txt, limt: 3}\n", r"line 3: .*'limit'\?"),
        ("  - {name: a, kind: refusals, path: x.txt}\n", r"line 3: .*refusals"),
        ("  - {name: a, kind: refusal}\n", r"line 3: 'tasks.0.path' is missing"),
        ("  - {name: a, kind: refusal, path: x.txt, limit: 0}\n", r"limit.*not 0"),
        ("  - {name: a/b, kind: refusal, path: x.txt}\n", r"tasks.0.name"),
        ("  - {name: a, kind: refusal, path: y.txt}\n", r"task a: no such file y.txt"),
        ("  - {name: a, kind: exact_match, path: x.txt, extract: '('}\n", r"regular expression"),
        ("  - {name: a, kind: refusal, path: x.txt, judge: true}\n", r"no `judge`"),
        ("  - {name: a, kind: refusal, path: x.txt}\n" * 2, r"two tasks are named a"),
        ("  - {name: a, kind: refusal, path: '${NOT_SET_ANYWHERE}'}\n", r"NOT_SET_ANYWHERE"),
        ("  - {name: [\n", r"line \d+: .*fix the YAML there"),
        ("  []\n", r"tasks.*at least 1 item"),
        ("  - {name: a, kind: refusal, path: x.txt}\nrefusal: 1\n", r"unknown key 'refusal'"),
        ("  - {name: a, kind: refusal, path: x.txt, perplexity: 1}\n", r"key 'tasks.0.perplexity'"),
        ("  - {name: a, kind: refusal, path: x.txt, seed: -1}\n", r"seed.*not -1"),
        ("  - {name: a, kind: refusal, path: x.txt, temperature: .inf}\n", r"temperature.*inf"),
    ],
)
def test_a_mistake_in_a_suite_is_told_with_its_line_and_remedy(tmp_path, tasks, message):
    (tmp_path / "x.txt").write_text("a prompt\n")
    with pytest.raises(InputError, match=message) as caught:
        _suite(tmp_path, tasks)
    assert "suite.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_in_the_judges_address_is_refused(tmp_path):
    (tmp_path / "x.txt").write_text("a prompt\n")
    rest = "judge: {base_url: 'https://user:secret@host/v1', model: m}\n"
    with pytest.raises(InputError, match="base_url") as caught:
        _suite(tmp_path, "  - {name: a, kind: refusal, path: x.txt}\n", rest)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '[{"prompt": "a"},', r"line 1: not valid JSON"),
        ("x.jsonl", '{"prompt": "a"}\nnonsense\n', r"line 2: not valid JSON"),
        ("x.jsonl", "[1]\n", r"row 1: expected an object"),
        ("x.json", '{"a": 1}', r"expected a list of rows"),
        ("x.csv", "colour\nred\n", r"row 1: found no prompt among the fields colour"),
        ("x.csv", "prompt\n\n", r"finds no row"),
        ("x.parquet", "PAR1", r"expected a csv, json, jsonl or txt"),
        ("x.json", '"hello"', r"expected a list of rows, found str"),
        ("x.json", "null", r"expected a list of rows, found NoneType"),
        ("x.jsonl", "[" * 100_000, r"line 1: nested too deeply"),
        ("x.json", '[{"prompt": "a", "prompt": "b"}]', r"the key 'prompt' appears twice"),
        ("x.jsonl", '{"prompt": ["a"]}', r"row 1: field 'prompt' must be text, found list"),
        ("x.jsonl", '{"prompt": "a\\ud800"}', r"half a surrogate pair"),
        ("x.csv", 'id,prompt\n1,"hi\n2,there\n', r"line \d: not valid CSV"),
        ("x.csv", "id,prompt\n1,hi,there\n", r"line 2: the row has another number of fields"),
        ("x.csv", "prompt,prompt\na,b\n", r"the column 'prompt' appears twice"),
    ],
)
def test_a_mistake_in_a_data_file_is_told_with_its_row(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        _items(tmp_path, f"kind: refusal, path: {name}")
    assert name in str(caught.value)


def test_the_example_suite_is_complete():
    suite = load_suite(SUITES / "example.yaml")
    assert {task.kind for task in suite.tasks} >= {"refusal", "over_refusal", "exact_match"}
    assert all(read_items(suite, task) for task in suite.tasks)


def test_the_suite_of_public_data_reads_the_files_as_published(real_data, monkeypatch):
    monkeypatch.setenv("OGPSA_DATA", str(real_data))
    suite = load_suite(SUITES / "public.yaml")
    counts = {task.name: len(read_items(suite, task)) for task in suite.tasks}
    assert counts["xstest-safe"] == 250
    assert counts["xstest-unsafe"] == 200
    assert counts["simple-safety-tests"] == 100
    assert counts["gsm8k"] == 200
    assert counts["harmbench-standard"] > 30


@pytest.mark.parametrize(
    "given, message",
    [
        ("oops", "--judge: 'oops' is not KEY=VALUE"),
        ("=3", "--judge: '=3' is not KEY=VALUE"),
        ("temperature=[", r"--judge: 'temperature=\[' is not KEY=VALUE"),
        ("max_token=3", "unknown key 'judge.max_token'; did you mean 'max_tokens'"),
        ("temperature=-1", "'judge.temperature'"),
        ("extra_body={stream: true}", "extra_body must not contain stream"),
    ],
)
def test_settings_of_the_judge_on_the_command_line_are_checked_as_those_of_the_suite(
    given, message, tmp_path, capsys
):
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "suite.yaml").write_text(
        "name: s\ntasks: [{name: t, kind: refusal, path: x.txt, judge: true}]\n"
        "judge: {base_url: 'http://localhost/v1', model: m}\n"
    )
    code = main(["evaluate", "no-model", "--suite", str(tmp_path / "suite.yaml"), "--judge", given])
    assert code == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert len(said.strip().splitlines()) == 1
