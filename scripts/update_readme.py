"""Put the demonstration's figure and tables into the documents.

README.md gets five rows: the model before alignment, the naive run, replay, and both forms of
OGPSA. docs/demo.md gets every row with every column.

    python scripts/update_readme.py --demo runs/demo
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ogpsa_jax.demo.methods import METHODS
from ogpsa_jax.demo.page import demo_figure
from ogpsa_jax.demo.recipe import MATCHED_SAFETY
from ogpsa_jax.demo.scoring import COMPLIANCE, SAFETY
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json
from ogpsa_jax.reporting import markdown_table
from ogpsa_jax.reporting.tables import aggregate, heading, with_spread
from ogpsa_jax.runs import BASE, ScoreRecord, read_scores

REPOSITORY = Path(__file__).resolve().parents[1]
# What the README shows is fixed here, before any result is known.
ROWS = [BASE, *(METHODS[name].kind for name in ("naive", "replay", "paper", "recommended"))]
SCORES = ("general", SAFETY, COMPLIANCE)


def replaced(document: str, content: str) -> str:
    """The document's text with `content` between its markers."""
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- BEGIN demo -->\n).*?(<!-- END demo -->)", re.DOTALL)
    if not pattern.search(text):
        raise InputError(f"{document}: the markers of demo are missing; put them back.")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def headline(demo: Path) -> tuple[str, list[ScoreRecord]]:
    """What the demonstration's figure shows: the title and the records of its first comparison."""
    results = demo / "results.json"
    first = read_json(results, "run the demonstration again")["comparisons"][0]
    records = read_scores(results)
    return first["title"], [records[i] for i in first["records"]]


def short_table(records: Sequence[ScoreRecord]) -> str:
    """The rows and scores that the README shows, as far as the demonstration has them."""
    rows = [row for row in aggregate(records, MATCHED_SAFETY) if row.stage in ("base", "sft")]
    lines = [["method", *(heading(name) for name in SCORES)], ["---", *(["---:"] * len(SCORES))]]
    for row in sorted(
        (row for row in rows if row.method in ROWS), key=lambda row: ROWS.index(row.method)
    ):
        scores = (with_spread(row.mean.get(name), row.spread.get(name)) for name in SCORES)
        lines.append([row.label, *scores])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True, help="folder of `ogpsa-jax demo`")
    arguments = parser.parse_args()
    try:
        title, records = headline(arguments.demo)
        # The curve of merged weights is in the figure.
        every = markdown_table([r for r in records if r.method != "merge"], MATCHED_SAFETY)
        documents = {
            "README.md": replaced("README.md", f"{title}:\n\n{short_table(records)}"),
            "docs/demo.md": replaced("docs/demo.md", f"{title}:\n\n{every}"),
        }
        assets = REPOSITORY / "docs" / "assets"
        assets.mkdir(parents=True, exist_ok=True)
        demo_figure(records).savefig(assets / "pareto.png")
    except (InputError, OSError) as error:
        print(f"update_readme: {error}", file=sys.stderr)
        return 2
    for document, text in documents.items():
        (REPOSITORY / document).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
