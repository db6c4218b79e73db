"""The script that builds the paper's files, on small local copies of their sources."""

import hashlib
import json
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ogpsa_jax.data import DataSource, Record, read_records

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"
Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def main() -> Main:
    found: Main = runpy.run_path(str(SCRIPT))["main"]
    return found


@pytest.fixture
def copies(tmp_path: Path, rng: random.Random) -> list[str]:
    """Arguments that name local copies: 60 safety prompts with several pairs each, some odd."""
    turn = {"role": "user", "content": "Q"}
    made: dict[str, list[dict[str, Any]]] = {
        "saferlhf": [
            {
                "prompt": f"Q{rng.randrange(60)}",
                "response_0": f"A{i}",
                "response_1": f"B{i}",
                "is_response_0_safe": rng.random() < 0.6,
                "is_response_1_safe": rng.random() < 0.6,
                "better_response_id": rng.randrange(2),
                "safer_response_id": 0,
            }
            for i in range(300)
        ],
        "ultrafeedback": [
            {
                "prompt": f"G{i}",
                "chosen": [
                    {**turn, "content": f"G{i}"},
                    {"role": "assistant", "content": f"C{i}" if i % 5 else "R"},
                ],
                "rejected": [
                    {**turn, "content": f"G{i}"},
                    {"role": "assistant", "content": "R"},
                ],
            }
            for i in range(50)
        ],
        "halueval": [
            {
                "user_query": f"H{i}",
                "chatgpt_response": "A",
                "hallucination": "yes" if i % 3 == 0 else "no",
            }
            for i in range(60)
        ],
    }
    arguments = []
    for name, rows in made.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments += [f"--{name}", str(path)]
    return arguments


SIZES = ["--sft-rows", "60", "--dpo-rows", "all", "--reference-rows", "40", "--held-out", "0.2"]


def records(folder: Path, name: str) -> list[Record]:
    kind = "preference" if "dpo" in name else "sft"
    return read_records(DataSource(str(folder / f"{name}.jsonl")), kind)[0]  # type: ignore[arg-type]


def test_files_hold_what_the_manifest_says(main: Main, copies: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["--out", str(out), *copies, *SIZES]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    names = {path.name for path in out.iterdir()}
    assert names == {*manifest["files"], "manifest.json"}
    for name, told in manifest["files"].items():
        content = (out / name).read_bytes()
        assert told["sha256"] == hashlib.sha256(content).hexdigest()
        assert told["rows"] == len(content.splitlines()) == len(records(out, Path(name).stem))
    assert manifest["files"]["safety_sft.jsonl"]["rows"] == 60
    for name in ("ultrafeedback_sft", "ultrafeedback_dpo", "halueval_sft"):
        assert manifest["files"][f"{name}.jsonl"]["rows"] == 40
    for source in manifest["sources"].values():
        [digest] = source["sha256"].values()
        assert digest == hashlib.sha256(Path(source["path"]).read_bytes()).hexdigest()


def test_no_stage_trains_on_prompts_that_another_is_tested_on(
    main: Main, copies: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["--out", str(out), *copies, *SIZES]) == 0
    trained = {r.prompt for name in ("safety_sft", "safety_dpo") for r in records(out, name)}
    tested = {
        r.prompt
        for name in ("safety_sft_heldout", "safety_dpo_heldout")
        for r in records(out, name)
    }
    assert tested
    assert trained
    assert not trained & tested


def test_chosen_answers_are_the_safe_ones(main: Main, copies: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["--out", str(out), *copies, *SIZES]) == 0
    safe = {}
    for line in (tmp_path / "saferlhf.jsonl").read_text().splitlines():
        row = json.loads(line)
        for i in (0, 1):
            safe[row[f"response_{i}"]] = row[f"is_response_{i}_safe"]
    for record in records(out, "safety_sft"):
        assert safe[record.messages[-1].content]
    for record in records(out, "safety_dpo"):
        assert (safe[str(record.chosen)], safe[str(record.rejected)]) == (True, False)


def test_same_seed_gives_the_same_bytes_and_another_seed_others(
    main: Main, copies: list[str], tmp_path: Path
) -> None:
    made = []
    for name, seed in {"a": "5", "b": "5", "c": "6"}.items():
        assert main(["--out", str(tmp_path / name), *copies, *SIZES, "--seed", seed]) == 0
        made.append(json.loads((tmp_path / name / "manifest.json").read_text())["files"])
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (["--reference-rows", "41"], "41 rows were requested, but only 40 are usable"),
        (["--sft-rows", "100000"], "100000 rows were requested"),
        (["--held-out", "1"], "--held-out must lie between 0 and 1"),
        (["--saferlhf", "absent.jsonl"], "no such file"),
        (["--halueval", "nobody/no-such-data:general"], "neither a local file"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_sentence(
    changed: list[str],
    says: str,
    main: Main,
    copies: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--out", str(tmp_path / "out"), *copies, *SIZES, *changed]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_real_copies_give_the_paper_s_reference_sets(
    main: Main, tmp_path: Path, real_data: Path
) -> None:
    data = real_data / "data"
    arguments = [
        *("--saferlhf", str(data / "pku_saferlhf_5k" / "pku_seferlhf_realign_dpo_5k.json")),
        *("--ultrafeedback", str(data / "ogpsa_official" / "dpo_en_demo.json")),
        *("--halueval", str(data / "halueval" / "general_data.json")),
        *("--sft-rows", "2000", "--dpo-rows", "3000", "--held-out", "0.1"),
    ]
    assert main(["--out", str(tmp_path), *arguments]) == 0
    files = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert [files[f"{name}.jsonl"]["rows"] for name in ("halueval_sft", "ultrafeedback_dpo")] == [
        200,
        200,
    ]
    assert files["safety_dpo_heldout.jsonl"]["prompts"] == 93
