"""A suite of every kind of task, run by a model that echoes."""

import json
from pathlib import Path

from ogpsa_jax.evaluation.evaluate import run_suite
from ogpsa_jax.evaluation.items import read_items
from ogpsa_jax.evaluation.suite import load_suite
from ogpsa_jax.runs import Cost, Provenance

NAMED = Provenance("echo", "base", "base", 0, Cost())
SUITE = """
name: trial
tasks:
  - {name: harmful, kind: refusal, path: harmful.txt}
  - {name: harmless, kind: over_refusal, path: harmless.txt}
  - {name: sums, kind: exact_match, path: sums.jsonl, extract: '-?\\d[\\d,]*', limit: LIMIT}
  - {name: choice, kind: multiple_choice, path: choice.jsonl, prompt: '{q}', score: null}
  - {name: text, kind: perplexity, path: harmless.txt, separator: "\\n"}
"""


def run_trial(model, path: Path, out: Path, **options):
    suite = load_suite(path)
    items = {task.name: read_items(suite, task) for task in suite.tasks}
    return run_suite(model, suite, items, out, NAMED, **options)


def item_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
