"""The official trainer's trajectories, reproduced by the replay script that anyone can run."""

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXTRACT = Path(__file__).parent / "extract"
RUNS = ("sft", "sft_pg_two", "sft_pg_thr", "dpo", "dpo_pg")


def replay(
    golden: Path, run: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "scripts" / "replay_golden.py"
    return subprocess.run(
        [sys.executable, script, "--golden", golden, "--run", run],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )


def written(folder: Path, seed: int, **fixed: Any) -> None:
    """A recording by the official rules in torch, in a process of its own: see torch_recording."""
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1); "
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch_recording; "
        f"print(torch_recording.draw(Path({str(folder)!r}), {seed}, **{fixed!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Compile what is the same only once."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def test_the_committed_extract_is_reproduced():
    # As whoever runs the script compiles it, and not as the tests do.
    result = replay(EXTRACT, "sft_pg_two", {"XLA_FLAGS": ""})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "weights, max" in result.stdout


def test_a_wrong_recording_is_told(tmp_path, quick):
    for item in EXTRACT.rglob("*.*"):
        target = tmp_path / item.relative_to(EXTRACT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(item.read_bytes())
    arrays = dict(np.load(EXTRACT / "runs" / "sft_pg_two.npz"))
    arrays["weights"] = arrays["weights"] * (1 + 1e-3)
    np.savez(tmp_path / "runs" / "sft_pg_two.npz", **arrays)
    result = replay(tmp_path, "sft_pg_two", quick)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BEYOND" in result.stdout


def test_a_missing_recording_is_bad_input():
    result = replay(EXTRACT, "no_such_run")
    assert result.returncode == 2
    assert "no_such_run.json" in result.stderr
    assert "Traceback" not in result.stderr


# Settings that no official recording at hand has. What is not named is drawn: schedule, warm-up,
# weight decay, clipping, batch size, accumulation, lengths; the last batches are mostly short.
FRESH: dict[str, dict[str, Any]] = {
    "sft": {"family": "qwen2", "tied": True, "stage": "sft_pg", "sets": 2},
    "threshold": {
        "family": "llama3",
        "stage": "sft_pg",
        "sets": 1,
        "method": "threshold",
    },
    "dpo": {"family": "llama3", "tied": False, "stage": "dpo_pg", "sets": 2, "base_num_steps": 2},
}
# Rules to break, and the run in which that tells most.
WRONG = {
    "global projection": "sft",
    "never refreshed": "dpo",
    "preference loss on references": "dpo",
}


@pytest.fixture(scope="module")
def seeds() -> dict[str, int]:
    return {name: secrets.randbits(32) for name in FRESH}


@pytest.mark.parametrize("name", FRESH)
def test_a_freshly_drawn_run_is_reproduced(tmp_path, quick, seeds, name):
    written(tmp_path, seeds[name], **FRESH[name])
    result = replay(tmp_path, "drawn", quick)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("wrong", WRONG)
def test_a_run_by_a_wrong_rule_is_told(tmp_path, quick, seeds, wrong):
    written(tmp_path, seeds[WRONG[wrong]], **FRESH[WRONG[wrong]], wrong=wrong)
    result = replay(tmp_path, "drawn", quick)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "weights" in result.stdout


@pytest.mark.parametrize("run", RUNS)
def test_the_torch_rules_are_the_official_trainer_s(real_data, run):
    """What is drawn above proves something only if its own rules are right."""
    from torch_recording import check

    if not (real_data / "golden").is_dir():
        pytest.skip(f"no recordings: {real_data}/golden does not exist")
    worst = check(real_data / "golden", run)
    print(worst)
    # Entries whose gradient is all rounding: Adam's first step gives them up to a learning rate.
    assert worst["weights"] <= 2e-5
    assert worst["losses"] <= 3e-6
    assert worst.get("bases", 0.0) <= 1e-6


@pytest.mark.parametrize("run", RUNS)
def test_the_full_recordings_are_reproduced(real_data, quick, run):
    if not (real_data / "golden").is_dir():
        pytest.skip(f"no recordings: {real_data}/golden does not exist")
    result = replay(real_data / "golden", run, quick)
    assert result.returncode == 0, result.stdout + result.stderr
