"""Safety fine-tuning of a real pre-trained model: naive, paper and recommended, side by side.

Runs ``configs/stories260k-sft.yaml`` once per method with the same seed (finished runs are not run
again) and prints the table of losses before and after, in nats per token.

    python scripts/stories_table.py [--stage sft|dpo] [--out runs] [key.sub=value ...]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ogpsa_jax.errors import InputError
from ogpsa_jax.training.config_file import load_config
from ogpsa_jax.training.run import train

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
METHODS = {"naive": "off", "paper": "paper", "recommended": "recommended"}


def run(stage: str, out: Path, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """The summary of each method's run."""
    summaries = {}
    for method, preset in METHODS.items():
        config = load_config(
            CONFIGS / f"stories260k-{stage}.yaml",
            [
                *overrides,
                f"ogpsa.preset={preset}",
                f"output_dir={out}/stories260k-{stage}-{method}",
            ],
        )
        summaries[method] = train(config)
    return summaries


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per method, a column per held-out measure."""
    before = next(iter(summaries.values()))["before"]
    names = list(before)
    rows = [
        ["", *names, "reference samples", "squared norm removed"],
        ["---"] + ["---:"] * (len(names) + 2),
        ["before", *(f"{before[name]:.3f}" for name in names), "", ""],
    ]
    for method, summary in summaries.items():
        removed = summary["projection"].get("mean_removed_fraction")
        rows.append(
            [
                method,
                *(f"{summary['after'][name]:.3f}" for name in names),
                str(summary["reference_samples"]),
                "" if removed is None else f"{removed:.1%}",
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=["sft", "dpo"], default="sft")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*", help="key.sub=value, for every run")
    arguments = parser.parse_args()
    try:
        summaries = run(arguments.stage, arguments.out, arguments.overrides)
    except InputError as error:
        print(f"stories_table: {error}", file=sys.stderr)
        return 2
    print(table(summaries))
    (arguments.out / f"stories260k-{arguments.stage}.json").write_text(
        json.dumps(summaries, indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
