"""The official trainer's trajectories, reproduced by the replay script that anyone can run."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXTRACT = Path(__file__).parent / "extract"


def replay(golden: Path, run: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "scripts" / "replay_golden.py"
    return subprocess.run(
        [sys.executable, script, "--golden", golden, "--run", run], capture_output=True, text=True
    )


def test_the_committed_extract_is_reproduced():
    result = replay(EXTRACT, "sft_pg_two")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "weights, max" in result.stdout


def test_a_wrong_recording_is_told(tmp_path):
    for item in EXTRACT.rglob("*.*"):
        target = tmp_path / item.relative_to(EXTRACT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(item.read_bytes())
    arrays = dict(np.load(EXTRACT / "runs" / "sft_pg_two.npz"))
    arrays["weights"] = arrays["weights"] * (1 + 1e-3)
    np.savez(tmp_path / "runs" / "sft_pg_two.npz", **arrays)
    result = replay(tmp_path, "sft_pg_two")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BEYOND" in result.stdout


def test_a_missing_recording_is_bad_input():
    result = replay(EXTRACT, "no_such_run")
    assert result.returncode == 2
    assert "no_such_run.json" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("run", ["sft", "sft_pg_two", "sft_pg_thr", "dpo", "dpo_pg"])
def test_the_full_recordings_are_reproduced(real_data, run):
    if not (real_data / "golden").is_dir():
        pytest.skip(f"no recordings: {real_data}/golden does not exist")
    result = replay(real_data / "golden", run)
    assert result.returncode == 0, result.stdout + result.stderr
