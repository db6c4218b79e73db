"""Files, folders and hub ids; slices and splits; and what is said of what cannot be read."""

import json
import random
from pathlib import Path

import pytest

from ogpsa_jax.data import DataSource, Record, read_records, split_by_prompt
from ogpsa_jax.errors import InputError


def rows(count: int, start: int = 0) -> str:
    return "".join(
        json.dumps({"prompt": f"Q{i}", "completion": f"A{i}"}) + "\n"
        for i in range(start, start + count)
    )


def answers(source: DataSource) -> list[str]:
    return [record.messages[-1].content for record in read_records(source, "sft")[0]]


def refusal(source: DataSource) -> str:
    with pytest.raises(InputError) as raised:
        read_records(source, "sft")
    return str(raised.value)


@pytest.mark.parametrize(
    ("split", "first", "last"),
    [
        ("train", 0, 20),
        ("train[:5]", 0, 5),
        ("train[5:]", 5, 20),
        ("train[3:7]", 3, 7),
        ("train[-4:]", 16, 20),
        ("train[:-4]", 0, 16),
        ("train[:25%]", 0, 5),
        ("train[75%:]", 15, 20),
        ("train[-10%:]", 18, 20),
    ],
)
def test_slice_of_rows(split: str, first: int, last: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(20))
    expected = [f"A{i}" for i in range(first, last)]
    assert answers(DataSource(str(tmp_path / "a.jsonl"), split=split)) == expected


@pytest.mark.parametrize("split", ["train[:21]", "train[20:]", "train[7:7]", "train[-21:]"])
def test_slice_beyond_the_data_is_refused(split: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(20))
    assert "the data has 20" in refusal(DataSource(str(tmp_path / "a.jsonl"), split=split))


@pytest.mark.parametrize("split", ["train[:5", "train[1:50%]", "[:5]", "train[a:]"])
def test_slice_that_is_none_is_refused(split: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(20))
    assert "is not understood" in refusal(DataSource(str(tmp_path / "a.jsonl"), split=split))


def test_percentages_never_part_the_rows_of_a_prompt(tmp_path: Path, rng: random.Random) -> None:
    lines = [
        json.dumps({"prompt": f"Q{rng.randrange(30)}", "chosen": f"A{i}", "rejected": "B"})
        for i in range(100)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    cut = rng.randrange(10, 90)
    sides = [
        read_records(DataSource(str(tmp_path / "a.jsonl"), split=split), "preference")[0]
        for split in (f"train[:{cut}%]", f"train[{cut}%:]")
    ]
    prompts = [{record.prompt for record in side} for side in sides]
    assert not prompts[0] & prompts[1]
    assert sum(len(side) for side in sides) == 100
    share = len(prompts[0]) / (len(prompts[0]) + len(prompts[1]))
    assert abs(share - cut / 100) <= 0.5 / len(prompts[0] | prompts[1]) + 1e-9


def test_split_by_prompt_is_a_partition_of_prompts(rng: random.Random) -> None:
    records = [Record(str(i), text=f"Q{rng.randrange(20)}") for i in range(100)]
    seed = rng.randrange(2**32)
    rest, drawn = split_by_prompt(records, 0.3, seed)
    assert not {r.prompt for r in rest} & {r.prompt for r in drawn}
    assert sorted([*rest, *drawn], key=lambda r: int(r.where)) == records
    assert len({r.prompt for r in drawn}) == round(0.3 * len({r.prompt for r in records}))
    assert split_by_prompt(records, 0.3, seed) == (rest, drawn)
    with pytest.raises(ValueError, match="fraction must lie between 0 and 1, found"):
        split_by_prompt(records, 1.5, seed)


def test_folder_gives_the_files_of_a_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "data" / "train-00000-of-00002.jsonl").write_text(rows(2))
    (tmp_path / "data" / "train-00001-of-00002.jsonl").write_text(rows(2, 2))
    (tmp_path / "data" / "test.jsonl").write_text(rows(1, 9))
    (tmp_path / "data" / "train_prefs-00000-of-00001.jsonl").write_text(rows(1, 7))
    assert answers(DataSource(str(tmp_path))) == ["A0", "A1", "A2", "A3"]
    assert answers(DataSource(str(tmp_path), split="test")) == ["A9"]
    assert answers(DataSource(str(tmp_path), split="train_prefs[:1]")) == ["A7"]
    assert "no file of split 'validation'" in refusal(DataSource(str(tmp_path), split="validation"))


def test_folder_of_test_files_is_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(rows(1))
    assert "no file of split 'train'; the folder contains test.jsonl" in refusal(
        DataSource(str(tmp_path))
    )


@pytest.mark.parametrize(
    ("names", "split", "asks"),
    [
        (
            ("train_sft-00000-of-00001", "train_prefs-00000-of-00001"),
            "train",
            "train_prefs, train_s",
        ),
        (("train-en", "train-de"), "train", "train-de, train-en"),
        (("sft_test", "prefs_test_2", "train"), "test", "prefs_test, sft_test"),
        (("train_sft/0000", "train_gen/0000"), "train", "train_gen, train_sft"),
    ],
)
def test_folder_of_several_splits_asks_which(
    names: tuple[str, ...], split: str, asks: str, tmp_path: Path
) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(rows(1, number))
    said = refusal(DataSource(str(tmp_path), split=split))
    assert f"'{split}' may be any of the splits {asks}" in said
    named = said.partition("splits ")[2].partition(",")[0]
    assert len(answers(DataSource(str(tmp_path), split=named))) == 1


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/0", "test/0"),
        ("my_train", "my_test"),
        ("data/rows-train-00000-of-00002", "data/rows-test-00000-of-00001"),
        ("train_sft", "test_sft"),
        ("train1", "test1"),
        ("training_set", "testing_set"),
        ("trainset", "testset"),
    ],
)
def test_no_file_of_another_split_is_read(train: str, test: str, tmp_path: Path) -> None:
    for number, name in enumerate((train, test)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(rows(1, number))
    assert answers(DataSource(str(tmp_path))) == ["A0"]
    assert answers(DataSource(str(tmp_path), split="test")) == ["A1"]


@pytest.mark.parametrize(
    "name",
    "LICENSE.txt README.txt license.json Readme.en.txt NOTICE.txt COPYING.txt requirements.txt "
    "dataset_info.json metadata.json .cache/x.jsonl".split(),
)
def test_file_about_the_data_is_no_data(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("Permission is granted.")
    assert "contains no .jsonl, .json" in refusal(DataSource(str(tmp_path)))
    (tmp_path / "data.jsonl").write_text(rows(2))
    assert answers(DataSource(str(tmp_path))) == ["A0", "A1"]


@pytest.mark.parametrize("name", ["more.jsonl.gz", "more.tsv", "more.arrow", "a.xlsx"])
def test_folder_with_files_that_are_not_read_says_so(name: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(rows(1))
    (tmp_path / name).write_text("x")
    assert f"the folder contains {name}, which cannot be read" in refusal(DataSource(str(tmp_path)))


def test_folder_of_texts_and_rows_asks_which(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once")
    (tmp_path / "b.jsonl").write_text(rows(1))
    assert "both text files (a.txt) and rows (b.jsonl); name the file" in refusal(
        DataSource(str(tmp_path))
    )


def test_split_that_a_saved_data_set_lacks_is_told(tmp_path: Path) -> None:
    import datasets

    made = datasets.Dataset.from_list([{"prompt": "Q", "completion": "A0"}])
    datasets.DatasetDict({"train_sft": made, "train_prefs": made}).save_to_disk(tmp_path / "two")
    made.save_to_disk(tmp_path / "one")
    assert "no split 'train'; it has train_sft, train_prefs" in refusal(
        DataSource(str(tmp_path / "two"))
    )
    assert answers(DataSource(str(tmp_path / "two"), split="train_sft")) == ["A0"]
    assert "no split 'test'" in refusal(DataSource(str(tmp_path / "one"), split="test"))
    assert answers(DataSource(str(tmp_path / "one"))) == ["A0"]


def test_csv_field_may_be_of_any_length(tmp_path: Path, rng: random.Random) -> None:
    text = "x" * rng.randint(131_073, 400_000)
    (tmp_path / "a.csv").write_text(f"prompt,completion\nQ,{text}\n")
    assert answers(DataSource(str(tmp_path / "a.csv"))) == [text]


def test_folder_of_unnamed_files_is_one_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(1))
    (tmp_path / "b.jsonl").write_text(rows(1, 1))
    assert answers(DataSource(str(tmp_path))) == ["A0", "A1"]


@pytest.mark.parametrize("names", [("safe", "unsafe"), ("main/train-0", "other/train-0")])
def test_files_that_are_not_parts_of_one_are_told(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.jsonl").write_text(rows(1))
    [note] = read_records(DataSource(str(tmp_path)), "sft").notes
    told = ", ".join(f"{name}.jsonl" for name in names)
    assert f"the rows of {told} are read together; name one of these files" in note
    alone = read_records(DataSource(str(tmp_path / f"{names[0]}.jsonl")), "sft")
    assert (len(alone.records), alone.notes) == (1, [])


def test_parts_of_one_file_are_read_in_silence(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        (tmp_path / f"{name}.json").write_text(f"[{rows(1)}]")
    found = read_records(DataSource(str(tmp_path)), "sft")
    assert (len(found.records), found.notes) == (2, [])


def test_one_name_in_two_kinds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(1))
    (tmp_path / "a.csv").write_text("prompt,completion\nQ,A0\n")
    assert "contains both a.csv and a.jsonl, which may be the same rows" in refusal(
        DataSource(str(tmp_path))
    )


def test_text_may_hold_any_line_separator(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0cfour\r\nfive"
    row = {"prompt": "Q", "completion": text}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False), newline="")
    (tmp_path / "b.csv").write_text(f'prompt,completion\nQ,"{text}"\n', newline="")
    for name in ("a.jsonl", "b.csv"):
        assert answers(DataSource(str(tmp_path / name))) == [text]


def test_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(1), encoding="utf-8-sig")
    assert answers(DataSource(str(tmp_path / "a.jsonl"))) == ["A0"]


UNREADABLE = {
    "broken line": ("a.jsonl", rows(2) + '{"prompt": \n', "a.jsonl, line 3: not valid JSON"),
    "not an object": ("a.jsonl", rows(1) + "[1]\n", "a.jsonl, line 2: a row must be an object"),
    "broken array": ("a.json", '[\n{"prompt": "Q"},\n{"prompt": }]', "a.json, line 3: not valid"),
    "missing comma": ("a.json", '[{"a": 1}\n{"a": 2}]', "a.json, line 2: not valid JSON"),
    "trailing comma": ("a.json", '[{"a": 1},\n]', "a.json, line 2: not valid JSON"),
    "unended array": ("a.json", '[{"a": 1}\n', "a.json, line 2: not valid JSON"),
    "more than an array": ("a.json", '[{"a": 1}]\nx', "a.json, line 2: not valid JSON"),
    "one object": ("a.json", '{\n"prompts": []\n}', "or, in a .json file, a list of rows"),
    "array of texts": (
        "a.json",
        '["Q"]',
        "row 1, line 1: a row must be an object ({...}), found str",
    ),
    "a key twice": (
        "a.jsonl",
        rows(1) + '{"prompt": "Q", "prompt": "R", "completion": "A"}\n',
        "a.jsonl, line 2: the key 'prompt' appears twice; keep one of them.",
    ),
    "a key twice in a list": (
        "a.json",
        '[{"a": 1},\n{"a": {"b": 1, "b": 2}}]',
        "a.json, line 2: the key 'b' appears twice",
    ),
    "another format": (
        "a.jsonl",
        rows(1) + '{"instruction": "Q", "output": "A"}\n',
        "the first row, whose columns are prompt, completion: rows of another one need",
    ),
    "deep": ("a.jsonl", "[" * 100_000, "nested too deeply"),
    "long number": (
        "a.jsonl",
        '{"text": ' + "9" * 6000 + "}",
        "a.jsonl, line 1: nested too deeply, or a num",
    ),
    "long number in a list": (
        "a.json",
        '[\n{"n": ' + "9" * 6000 + "}]",
        "a.json, line 2: nested too",
    ),
    "deep row": ("a.json", "[\n" + "[" * 100_000, "a.json, line 2: nested too deeply"),
    "empty": ("a.jsonl", "", "split 'train' has no row"),
    "empty array": ("a.json", "[]", "split 'train' has no row"),
    "few fields": (
        "a.csv",
        "prompt,completion\nQ,A\nQ\n",
        "a.csv, line 3: the row has another number",
    ),
    "more fields": (
        "a.csv",
        "prompt,completion\nQ,A,B\n",
        "a.csv, line 2: the row has another number",
    ),
    "open quote": ("a.csv", 'prompt,completion\nQ,"A\n', "not valid CSV"),
    "no parquet": ("a.parquet", "PAR", "not a readable Parquet file"),
    "unknown kind": ("a.zip", "PK", "files of this kind are not read"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_file_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    file, content, says = UNREADABLE[name]
    (tmp_path / file).write_text(content, newline="")
    assert says in refusal(DataSource(str(tmp_path / file)))


def test_bytes_that_are_no_text_are_told_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(rows(2).encode() + b'{"prompt": "\xff"}')
    assert "a.jsonl, line 3: not UTF-8 text" in refusal(DataSource(str(tmp_path / "a.jsonl")))


def test_rows_of_an_array_know_their_lines(tmp_path: Path) -> None:
    row = {"prompt": "Q", "completion": ""}
    (tmp_path / "a.json").write_text(json.dumps([row, row], indent=1))
    (tmp_path / "b.csv").write_text('prompt,completion\n"Q\nmore",A\nQ,\n')
    assert "a.json, row 1, line 2: 'completion' is empty" in refusal(
        DataSource(str(tmp_path / "a.json"))
    )
    assert "b.csv, line 4: 'completion' is empty" in refusal(DataSource(str(tmp_path / "b.csv")))


def test_all_malformed_rows_are_told_at_once(tmp_path: Path, rng: random.Random) -> None:
    bad = sorted(rng.sample(range(20), 3))
    lines = rows(20).splitlines()
    for i in bad:
        lines[i] = '{"prompt": "Q"}'
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said = refusal(DataSource(str(tmp_path / "a.jsonl"), format="prompt_completion"))
    assert f"line {bad[0] + 1}: " in said
    assert said.endswith(f"(and 2 rows more: line {bad[1] + 1}, line {bad[2] + 1}).")


@pytest.mark.parametrize("path", ["absent.jsonl", "./absent", "/absent/file"])
def test_missing_file_is_told(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refusal(DataSource(path))


def test_hub_id_that_cannot_be_reached_is_told() -> None:
    assert "neither a local file or folder nor a hub data set" in refusal(
        DataSource("nobody/no-such-data:subset")
    )


def test_file_has_no_other_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows(1))
    (tmp_path / "test.jsonl").write_text(rows(1))
    assert "a single file has no split 'test'" in refusal(
        DataSource(str(tmp_path / "a.jsonl"), split="test")
    )
    assert answers(DataSource(str(tmp_path / "test.jsonl"), split="test")) == ["A0"]


def test_source_whose_rows_are_all_discarded_is_refused(tmp_path: Path) -> None:
    row = {"user_query": "Q", "chatgpt_response": "A", "hallucination": "yes"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert (
        "has no usable row: 1 row is skipped ('hallucination' says that the answer is bad: 1)"
    ) in refusal(DataSource(str(tmp_path / "a.jsonl")))
