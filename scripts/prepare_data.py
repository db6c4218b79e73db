"""Build the data files of the paper: safety SFT and pairs, and 200-row reference sets.

    python scripts/prepare_data.py --out data

From the hub, or from local copies:

    python scripts/prepare_data.py --out data --saferlhf FILE --ultrafeedback FILE --halueval FILE

Written into the folder, as JSON Lines:

    safety_sft.jsonl, safety_sft_heldout.jsonl      PKU-SafeRLHF, the safe answers
    safety_dpo.jsonl, safety_dpo_heldout.jsonl      PKU-SafeRLHF, safe against unsafe
    ultrafeedback_sft.jsonl, ultrafeedback_dpo.jsonl, halueval_sft.jsonl      the reference sets
    manifest.json      seed, sources, counts and SHA-256 of every file

The same prompts are held out of SFT and DPO. The same sources, sizes and seed give the same bytes.
The rows carry the licences of their sources; PKU-SafeRLHF is for non-commercial use.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ogpsa_jax.data import DataSource, Record, read_records, split_by_prompt
from ogpsa_jax.data.records import Kind
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import make_folder


def read(source: DataSource, kind: Kind) -> list[Record]:
    """The records of a source that can be trained on, without duplicates."""
    records = read_records(source, kind).records
    distinct = {
        (record.messages, record.chosen, record.rejected): record
        for record in records
        if not record.flaw
    }
    return list(distinct.values())


def draw(records: Sequence[Record], rows: int | None, seed: int, what: str) -> list[Record]:
    """That many records, drawn by the seed, in the given order; all of them if None."""
    if rows is None:
        return list(records)
    if rows > len(records):
        raise InputError(
            f"{what}: {rows} rows were requested, but only {len(records)} are usable; request at "
            f"most {len(records)}."
        )
    drawn = np.random.default_rng(seed).permutation(len(records))[:rows]
    return [records[i] for i in sorted(drawn)]


def as_row(record: Record) -> dict[str, Any]:
    """A record in the conversational layout that TRL reads too."""
    turns: list[dict[str, Any]] = [
        {"role": m.role, "content": m.content} | ({} if m.trained else {"weight": 0})
        for m in record.messages
    ]
    if record.chosen is None:
        return {"messages": turns}
    sides = {"chosen": record.chosen, "rejected": record.rejected}
    return {
        "prompt": turns,
        **{side: [{"role": "assistant", "content": said}] for side, said in sides.items()},
    }


def write(path: Path, records: Sequence[Record]) -> dict[str, Any]:
    """Write the records; what the manifest says of the file."""
    lines = [json.dumps(as_row(record), ensure_ascii=False) + "\n" for record in records]
    content = "".join(lines).encode()
    path.write_bytes(content)
    return {
        "rows": len(records),
        "prompts": len({record.prompt for record in records}),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def describe(source: DataSource) -> dict[str, Any]:
    """What the manifest says of a source."""
    described = {"path": source.path, "split": source.split}
    path = Path(source.path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    hashes = {
        str(file.relative_to(path) if path.is_dir() else file.name): hashlib.sha256(
            file.read_bytes()
        ).hexdigest()
        for file in files
        if file.is_file()
    }
    return {**described, "sha256": hashes} if hashes else described


def prepare_data(
    out: Path,
    *,
    saferlhf: DataSource,
    ultrafeedback: DataSource,
    halueval: DataSource,
    sft_rows: int | None,
    dpo_rows: int | None,
    reference_rows: int | None,
    held_out: float,
    seed: int,
) -> dict[str, Any]:
    """Build all files in `out`; returns the manifest.

    Raises:
      InputError: a source cannot be read, or contains too few rows.
    """
    pairs = read(saferlhf, "preference")
    answers = read(saferlhf, "sft")
    # One draw over the prompts of both, so that no stage trains on what another is tested on.
    _, tested = split_by_prompt([*answers, *pairs], held_out, seed)
    prompts = {record.prompt for record in tested}

    def side(records: Sequence[Record], *, test: bool) -> list[Record]:
        return [record for record in records if (record.prompt in prompts) == test]

    general = draw(read(ultrafeedback, "preference"), reference_rows, seed, ultrafeedback.path)
    files = {
        "safety_sft": draw(side(answers, test=False), sft_rows, seed, saferlhf.path),
        "safety_sft_heldout": side(answers, test=True),
        "safety_dpo": draw(side(pairs, test=False), dpo_rows, seed, saferlhf.path),
        "safety_dpo_heldout": side(pairs, test=True),
        "ultrafeedback_sft": [pair.answered() for pair in general],
        "ultrafeedback_dpo": general,
        "halueval_sft": draw(read(halueval, "sft"), reference_rows, seed, halueval.path),
    }
    make_folder(out)
    manifest = {
        "seed": seed,
        "held_out": held_out,
        "sources": {
            "saferlhf": describe(saferlhf),
            "ultrafeedback": describe(ultrafeedback),
            "halueval": describe(halueval),
        },
        "files": {
            f"{name}.jsonl": write(out / f"{name}.jsonl", rows) for name, rows in files.items()
        },
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def size(text: str) -> int | None:
    """A number of rows, or ``all``."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number or all, found {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A number to draw from."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, found {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = {
        "saferlhf": ("PKU-Alignment/PKU-SafeRLHF", "train"),
        "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
        "halueval": ("pminervini/HaluEval:general", "data"),
    }
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    for name, (hub, split) in sources.items():
        parser.add_argument(f"--{name}", default=hub, help=f"file, folder or hub id ({hub})")
        parser.add_argument(f"--{name}-split", help=f"its split ({split}; of a local copy, train)")
    parser.add_argument("--sft-rows", type=size, default=10_000, help="SFT rows, or all (10000)")
    parser.add_argument("--dpo-rows", type=size, default=10_000, help="pairs, or all (10000)")
    parser.add_argument(
        "--reference-rows", type=size, default=200, help="rows of each reference set (200)"
    )
    parser.add_argument(
        "--held-out", type=float, default=0.05, help="share of the safety prompts held out (0.05)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of every draw (0)")
    parsed = parser.parse_args(arguments)
    chosen = {}
    for name, (hub, split) in sources.items():
        path = getattr(parsed, name)
        default = split if path == hub else "train"
        chosen[name] = DataSource(path, split=getattr(parsed, f"{name}_split") or default)
    try:
        if not 0 < parsed.held_out < 1:
            raise InputError(f"--held-out must lie between 0 and 1, found {parsed.held_out}.")
        manifest = prepare_data(
            parsed.out,
            **chosen,
            sft_rows=parsed.sft_rows,
            dpo_rows=parsed.dpo_rows,
            reference_rows=parsed.reference_rows,
            held_out=parsed.held_out,
            seed=parsed.seed,
        )
    except InputError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    for name, file in manifest["files"].items():
        print(f"{name:<26} {file['rows']:>7} rows {file['prompts']:>7} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
