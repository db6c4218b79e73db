"""An evaluation that was stopped, killed or damaged goes on where it was, or says why not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ogpsa_jax.errors import InputError
from tests.evaluation.fakes import EchoModel
from tests.evaluation.trial import SUITE, item_lines, run_trial


def test_a_stopped_evaluation_goes_on_where_it_was(suite_path, tmp_path, drawn):
    whole = run_trial(EchoModel(), suite_path, tmp_path / "whole", batch_size=3)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_trial(EchoModel(stop_after=drawn.randrange(3, 25)), suite_path, out, batch_size=3)
    done = item_lines(out)
    assert done
    second = EchoModel()
    results = run_trial(second, suite_path, out, batch_size=3)
    keys = [line["key"] for line in item_lines(out)]
    assert len(keys) == len(set(keys)) == 10 + 5 + 8 + 1 + 5
    assert keys[: len(done)] == [line["key"] for line in done]
    assert results["items_reused"] == len(done)
    # Nothing that was done is asked again; a choice is two questions.
    asked_before = sum(2 if "choices" in line else 1 for line in done)
    assert len(second.asked) == 10 + 5 + 8 + 2 + 5 - asked_before
    assert results["tasks"] == whole["tasks"]


def test_a_torn_last_line_is_dropped_and_done_again(suite_path, tmp_path, drawn):
    out = tmp_path / "out"
    whole = run_trial(EchoModel(), suite_path, out)
    content = (out / "items.jsonl").read_bytes()
    (out / "items.jsonl").write_bytes(content[: -drawn.randrange(2, 40)])
    model = EchoModel()
    results = run_trial(model, suite_path, out)
    assert len(model.asked) == 1
    assert results["tasks"] == whole["tasks"]
    assert len(item_lines(out)) == 29


def test_other_weights_or_settings_start_anew_and_a_higher_limit_adds(suite_path, tmp_path):
    out = tmp_path / "out"
    suite_path.write_text(SUITE.replace("LIMIT", "3"))
    run_trial(EchoModel(), suite_path, out)
    suite_path.write_text(SUITE.replace("LIMIT", "6"))
    model = EchoModel()
    run_trial(model, suite_path, out)
    assert len(model.asked) == 3  # the other sums
    changed = suite_path.read_text().replace("harmful.txt", "harmful.txt, max_new_tokens: 7")
    suite_path.write_text(changed)
    model = EchoModel()
    run_trial(model, suite_path, out)
    assert len(model.asked) == 10
    model = EchoModel(fingerprint="2")
    results = run_trial(model, suite_path, out)
    assert results["items_reused"] == 0
    assert len(model.asked) == 10 + 5 + 6 + 2 + 5


def test_sampled_answers_do_not_depend_on_where_a_run_was_stopped(suite_path, tmp_path, drawn):
    suite_path.write_text(
        "name: sampled\nseed: 5\ntasks:\n"
        "  - {name: harmful, kind: refusal, path: harmful.txt, temperature: 1.0}\n"
    )

    def answers(out):
        return {line["item"]: line["answer"] for line in item_lines(out)}

    run_trial(EchoModel(), suite_path, tmp_path / "whole", batch_size=4)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_trial(EchoModel(stop_after=4), suite_path, out, batch_size=4)
    content = (out / "items.jsonl").read_bytes().splitlines(keepends=True)
    (out / "items.jsonl").write_bytes(b"".join(content[: drawn.randrange(1, 4)]))
    run_trial(EchoModel(), suite_path, out, batch_size=4)
    assert answers(out) == answers(tmp_path / "whole")


def test_a_line_that_is_no_items_is_told(suite_path, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "items.jsonl").write_text("hello\n")
    with pytest.raises(InputError, match=r"items.jsonl, line 1: not a line"):
        run_trial(EchoModel(), suite_path, tmp_path / "out")


@pytest.mark.parametrize("line", [b"\xff", b"[" * 100_000, b'{"key": 1, "answer": "x"}'])
def test_a_damaged_log_is_told(suite_path, tmp_path, line):
    out = tmp_path / "out"
    run_trial(EchoModel(), suite_path, out)
    lines = (out / "items.jsonl").read_bytes().splitlines()
    if line.startswith(b"{"):  # a line of an item that lacks what was measured
        kept = {"key": json.loads(lines[-1])["key"], "answer": "x"}
        line, lines = json.dumps(kept).encode(), lines[:-1]
    (out / "items.jsonl").write_bytes(b"\n".join([line, *lines, b""]))
    with pytest.raises(InputError, match=r"items.jsonl.* remove the"):
        run_trial(EchoModel(), suite_path, out)


def test_a_killed_process_loses_no_finished_item(suite_path, tmp_path):
    script = """
import sys, time
from pathlib import Path
from tests.evaluation.fakes import EchoModel
from tests.evaluation.trial import run_trial
class Slow(EchoModel):
    def _count(self, prompts):
        super()._count(prompts)
        if len(self.asked) > 9:
            print("in the middle", flush=True)
            time.sleep(60)
run_trial(Slow(), Path(sys.argv[1]), Path(sys.argv[2]), batch_size=3)
"""
    out = tmp_path / "out"
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(suite_path), str(out)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert len(item_lines(out)) == 9
    assert not (out / "results.json").exists()
    model = EchoModel()
    results = run_trial(model, suite_path, out, batch_size=3)
    assert results["items_reused"] == 9
    assert results["tasks"]["harmful"]["value"] == 0.7
