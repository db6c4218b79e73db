"""Put the demonstration's table and figure into the README.

python scripts/update_readme.py --demo runs/demo
"""

import argparse
import re
import sys
from pathlib import Path

from ogpsa_jax.demo.page import demo_figure
from ogpsa_jax.demo.recipe import MATCHED_SAFETY
from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation import Record, read_records
from ogpsa_jax.files import read_json
from ogpsa_jax.reporting import markdown_table

REPOSITORY = Path(__file__).resolve().parents[1]


def replaced(text: str, name: str, content: str) -> str:
    """`text` with everything between the markers of `name` replaced."""
    pattern = re.compile(rf"(<!-- BEGIN {name} -->\n).*?(<!-- END {name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise InputError(f"README.md: the markers of {name} are missing; put them back.")
    return pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def headline(demo: Path) -> tuple[str, list[Record]]:
    """What the demonstration's picture shows: the title and the records of its first comparison."""
    results = demo / "results.json"
    first = read_json(results, "run the demonstration again")["comparisons"][0]
    records = read_records(results)
    return first["title"], [records[i] for i in first["records"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True, help="folder of `ogpsa-jax demo`")
    arguments = parser.parse_args()
    readme = REPOSITORY / "README.md"
    text = readme.read_text(encoding="utf-8")
    try:
        title, records = headline(arguments.demo)
        # The curve of merged weights is in the figure.
        shown = [record for record in records if record.method != "merge"]
        text = replaced(text, "demo", f"{title}:\n\n{markdown_table(shown, MATCHED_SAFETY)}")
        assets = REPOSITORY / "docs" / "assets"
        assets.mkdir(parents=True, exist_ok=True)
        demo_figure(records).savefig(assets / "pareto.png")
    except (InputError, OSError) as error:
        print(f"update_readme: {error}", file=sys.stderr)
        return 2
    readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
