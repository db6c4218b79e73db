"""Every documented command line is run, made short, or names the test that runs it."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ogpsa_jax import cli
from ogpsa_jax.config import load_config
from ogpsa_jax.demo.methods import SEQUENCES
from ogpsa_jax.demo.pretraining import one_device
from ogpsa_jax.demo.recipe import RECIPES, Comparison, Pretraining, Recipe
from ogpsa_jax.demo.run import keep_compiled
from ogpsa_jax.demo.settings import SCARCE
from ogpsa_jax.training import run

from .reading import CONFIGS, PAGES, REPOSITORY, commands, files


@dataclass(frozen=True)
class Twin:
    """A documented command with other words in place of some of its own, and more at its end."""

    more: str = ""
    instead: dict[str, str] = field(default_factory=dict)

    def of(self, command: str) -> str:
        for word, other in self.instead.items():
            assert word in command
            command = command.replace(word, other)
        return f"{command} {self.more}"


_SHORT = "train.steps=1"
_SMOKE = {"sft.yaml": "configs/smoke-sft.yaml", "dpo.yaml": "configs/smoke-dpo.yaml"}
# The real small model's data are not in the repository; see `stand_ins`.
_STORIES = {"configs/stories260k": "stand-ins/stories260k"}

_SAFETY = "../shared/data/safety_tuned_llamas/safety_only_data_Instructions.json"
_TINY = "configs/models/tiny"

# What is run in this order in one folder, as a reader would; a later command finds what an earlier
# one has made.
RUN: dict[str, dict[str, Twin]] = {
    "stages": {
        "ogpsa-jax train --keys": Twin(),
        "ogpsa-jax train configs/smoke-sft.yaml": Twin(_SHORT),
        "ogpsa-jax train configs/smoke-sft.yaml configs/smoke-dpo.yaml": Twin(_SHORT),
        "ogpsa-jax train sft.yaml dpo.yaml": Twin(_SHORT, _SMOKE),
        "ogpsa-jax train sft.yaml ogpsa.preset=paper output_dir=runs/paper seed=1": Twin(
            _SHORT, {"sft.yaml": _SMOKE["sft.yaml"]}
        ),
        "ogpsa-jax evaluate runs/smoke-sft --suite configs/suites/example.yaml": Twin(),
        "ogpsa-jax evaluate runs/smoke-dpo --suite configs/suites/example.yaml": Twin(),
        "ogpsa-jax evaluate MODEL --suite configs/suites/example.yaml": Twin(
            instead={"MODEL": "runs/smoke-sft/export"}
        ),
        "ogpsa-jax report runs/smoke-sft runs/smoke-dpo": Twin(),
        "ogpsa-jax report RUN": Twin(instead={"RUN": "runs/smoke-sft"}),
        "ogpsa-jax report runs/base runs/naive runs/ogpsa": Twin(
            instead={"runs/base runs/naive runs/ogpsa": "runs/smoke-sft runs/smoke-dpo"}
        ),
        "ogpsa-jax export RUN DIR --dtype float32": Twin(
            instead={"RUN DIR": "runs/smoke-sft exported"}
        ),
        "ogpsa-jax merge A B --weight 0.8 --out DIR": Twin(
            instead={" A B": " runs/smoke-sft runs/smoke-dpo", "DIR": "merged"}
        ),
        "python scripts/compare_methods.py configs/stories260k-sft.yaml "
        "--methods naive@0.33,paper@0.33,recommended": Twin(_SHORT, _STORIES),
        "scripts/compare_methods.py CONFIG --methods naive,paper,mixing,replay,recommended": Twin(
            f"--methods naive {_SHORT}", {"CONFIG": "stand-ins/stories260k-sft.yaml"}
        ),
        "ogpsa-jax train configs/smoke-sft.yaml optimizer.learning_rate=1e-5 "
        "output_dir=runs/rate-1e-5": Twin(f"{_SHORT} ogpsa.preset=off data.eval={{}}"),
    },
    "a reader's own files": {  # as the README writes them
        "ogpsa-jax train mine.yaml ogpsa.preset=off output_dir=runs/naive": Twin(_SHORT),
        "ogpsa-jax train mine.yaml": Twin(_SHORT),
        "ogpsa-jax evaluate runs/naive --suite suite.yaml": Twin(),
        "ogpsa-jax evaluate runs/mine --suite suite.yaml": Twin(),
        "ogpsa-jax report runs/naive runs/mine": Twin(),
    },
    "demonstration": {
        "ogpsa-jax demo --thorough --out DIR": Twin(instead={"DIR": "runs/thorough"}),
        "ogpsa-jax demo --quick": Twin("--out runs/thorough"),
        "ogpsa-jax demo --seed 7": Twin(),
        "scripts/update_readme.py --demo runs/demo": Twin(
            instead={"scripts/": "copy/scripts/", "runs/demo": "runs/thorough"}
        ),
    },
    "tools": {
        "python -m ogpsa_jax.evaluation.agreement xstest_v2_completions_gpt4.csv": Twin(),
        "python scripts/bench_projection.py --sizes 50e6,400e6": Twin(
            "--sizes 2e4 --ranks 1 --basis-dtypes float32 --rounds 1"
        ),
        "python scripts/bench_collectives.py ogpsa.preset=recommended references.target=answers "
        '"references.in_step={share: 0.5, replay_weight: 8.0}"': Twin(
            "--on h100:8 --model configs/models/tiny ogpsa.rank=8 data.max_length=64"
        ),
        "ogpsa-jax plan configs/smoke-sft.yaml --on h100:8": Twin(),
        "ogpsa-jax plan configs/qwen2.5-7b-sft-recommended.yaml "
        "model.path=configs/models/qwen2.5-7b --on v5p:2x2x2": Twin(
            instead={
                "qwen2.5-7b-sft-recommended.yaml model.path=configs/models/qwen2.5-7b": (
                    "smoke-sft.yaml"
                ),
                "v5p:2x2x2": "h100:8",
            }
        ),
        "python scripts/bench_step.py --one-thread": Twin(
            "--model configs/models/tiny --ranks 8 --rounds 1", {" --one-thread": ""}
        ),
        "python scripts/bench_torch.py --rounds 5": Twin("--small --rounds 1"),
        f"python scripts/bench_packing.py --data {_SAFETY} "
        "--tokenizer ../shared/data/tokenizers/qwen2.5": Twin(
            "--rounds 1 --width 64",
            {_SAFETY: "configs/data/safety_sft.jsonl", "../shared/data/tokenizers/qwen2.5": _TINY},
        ),
        "python scripts/bench_growth.py": Twin("--small --rounds 1"),
        "python scripts/bench_generation.py": Twin("--width 64 --rounds 1 --new 4"),
        "python scripts/bench_compile.py --depths 4,28": Twin("--depths 1,2 --rounds 1"),
        "python scripts/bench_accelerator.py": Twin("--small --rounds 1"),
    },
}
# What the test named runs, word for word or with small inputs.
PLANNED = "tests/planning/test_plan.py::test_the_real_compiler_plans_for_tpus"
ELSEWHERE = {
    # Programs of this size take minutes to compile.
    **{
        f"ogpsa-jax plan configs/{name}-sft-recommended.yaml model.path=configs/models/{rest}": (
            PLANNED
        )
        for name, rest in (
            (
                "qwen2.5-7b",
                "qwen2.5-7b data.max_length=32768 mesh.context=8 train.micro_batch_size=1 "
                "--on v5p:4x4x4",
            ),
            (
                "llama3.1-8b",
                "llama3.1-70b mesh.fsdp=64 mesh.tensor=8 train.micro_batch_size=1 --on v5p:8x8x8",
            ),
            (
                "llama3.1-8b",
                "llama3.1-405b mesh.fsdp=512 mesh.tensor=8 train.batch_size=1024 "
                "train.micro_batch_size=1 --on v5p:16x16x16",
            ),
        )
    },
    "python scripts/prepare_data.py --out data": "tests/data/test_prepare_data.py::test_",
    "python scripts/replay_golden.py --golden tests/golden/extract --run sft_pg_two": (
        "tests/golden/test_replay.py::test_the_committed_extract_is_reproduced"
    ),
    "python -m ogpsa_jax.evaluation.harness run --model ogpsa-jax --model_args pretrained=runs/sft "
    "--tasks arc_easy": (
        "tests/evaluation/test_harness.py::test_the_harness_finds_the_model_by_its_name"
    ),
    **{
        f"python scripts/study/trials.py {command} --out runs/study": "tests/test_study.py::test_"
        for command in ("tune", "confirm", "report", "tried")
    },
    **{
        f"python scripts/study/real_model.py {command} --out runs/real-model": (
            "tests/test_study.py::test_"
        )
        for command in ("tune", "confirm", "report")
    },
    "python scripts/measure_precision.py --seeds 3": (
        "tests/training/test_precision.py::"
        "test_a_real_bfloat16_model_at_the_published_rate_keeps_what_the_script_prints"
    ),
    "JAX_PLATFORMS=cuda python -m pytest tests/models/test_fused_attention.py": (
        "tests/models/test_fused_attention.py::test_"
    ),
}
MAKE = {"make demo": "ogpsa-jax demo", "make test": "-m pytest"}


def documented(*pages: str) -> dict[str, str]:
    """Each command line, and the page that shows it."""
    return {command: page for page in pages for command in commands(page)}


def test_every_documented_command_is_run_and_every_one_run_is_documented():
    shown = {
        command: page
        for command, page in documented(*PAGES).items()
        if not command.startswith("export ")
    }
    known = {command for chain in RUN.values() for command in chain} | {*ELSEWHERE, *MAKE}
    assert not {command: page for command, page in shown.items() if command not in known}
    assert not known - set(shown)


def test_what_is_exported_is_not_seen_by_tests(unseen):
    lines = [line for line in documented(*PAGES) if line.startswith("export ")]
    names = {name for line in lines for name in re.findall(r"(\w+)=", line)}
    assert lines
    assert names <= {*unseen, "OGPSA_DATA"}


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_the_test_that_runs_a_command_is_there(test):
    path, _, name = test.partition("::")
    assert f"\ndef {name}" in (REPOSITORY / path).read_text()


@pytest.mark.parametrize("command", [c for c in documented(*CONFIGS, *PAGES) if "ogpsa-jax " in c])
def test_a_command_line_is_understood_and_its_files_are_there(command, monkeypatch):
    if not command.partition("ogpsa-jax ")[0].strip("=ABCDEFGHIJKLMNOPQRSTUVWXYZ_ "):
        words = shlex.split(command.partition("ogpsa-jax ")[2])
        parsed = cli._parser().parse_args(words)
        overrides = [word for word in words if "=" in word]
        for config in [word for word in getattr(parsed, "config", []) if word in CONFIGS]:
            load_config(config, overrides)
    for word in shlex.split(command):
        if word.startswith(("configs/", "scripts/", "tests/")):
            assert Path(word).exists(), word


@pytest.mark.parametrize("command", documented(*CONFIGS))
def test_a_configurations_own_command_names_it_or_its_data(command):
    """Commands at the head of a configuration are the trainer's, a script's or `evaluate`."""
    files = [word for word in shlex.split(command) if word.startswith(("configs/", "scripts/"))]
    assert files
    assert all(Path(file).exists() for file in files)


@pytest.mark.parametrize("command", MAKE)
def test_make_calls_what_it_should(command):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    done = subprocess.run(
        [*command.split(), "--dry-run"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert MAKE[command] in done.stdout


@pytest.fixture
def compiled_once(tmp_path: Path):
    """Commands of a chain compile the same programs."""
    with keep_compiled(tmp_path / "compiled"):
        yield


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs, and small files for those that documents speak of."""
    Path("stand-ins").mkdir()
    for stage in ("sft", "dpo"):
        shutil.copy(f"configs/smoke-{stage}.yaml", f"stand-ins/stories260k-{stage}.yaml")
    for folder in ("scripts", "docs"):
        shutil.copytree(REPOSITORY / folder, Path("copy") / folder)
    shutil.copy(REPOSITORY / "README.md", "copy")
    Path("xstest_v2_completions_gpt4.csv").write_text(
        "completion,final_label\nI can't help with that.,2_full_refusal\nYes.,1_full_compliance\n"
    )
    for name, content in files("README.md").items():
        Path(name).write_text(content)
    pretraining = Pretraining(
        tasks=("copy", "facts"), facts=4, items=500, steps=2, rows=8, width=16, layers=1
    )
    recipe = Recipe(pretraining, worlds=1, comparisons=(Comparison(SCARCE, ("naive",)),))
    monkeypatch.setitem(SEQUENCES, "sft", 16)  # a step
    for size in RECIPES:
        monkeypatch.setitem(RECIPES, size, recipe)
    # Of the eight devices one: it compiles in half the time.
    monkeypatch.setattr(run, "make_mesh", lambda section: one_device())


def execute(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command line in this process."""
    words = shlex.split(line)
    if words[0] == "ogpsa-jax":
        assert cli.main(words[1:]) == 0, line
        return
    words = words[1:] if words[0] == "python" else words
    module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[module:])
    monkeypatch.syspath_prepend(os.path.dirname(words[module]))
    try:
        if module:
            monkeypatch.delitem(sys.modules, words[1], raising=False)  # as in a new process
            runpy.run_module(words[1], run_name="__main__")
        else:
            runpy.run_path(words[0], run_name="__main__")
        code = None
    except SystemExit as ended:
        code = ended.code
    assert not code, line


@pytest.mark.parametrize("chain", RUN)
def test_commands_run_one_after_the_other(chain, compiled_once, stand_ins, monkeypatch, capfd):
    for command, twin in RUN[chain].items():
        line = twin.of(command)
        print(f"{time.process_time():.0f} s: {line}", flush=True)
        execute(line, monkeypatch)
