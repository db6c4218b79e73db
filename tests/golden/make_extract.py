"""Trim a recorded run so that it can be committed: ``python make_extract.py GOLDEN RUN STEPS OUT``.

Keeps the first STEPS optimizer steps, the weights after the last of them, the first bases and the
last recorded projected micro-gradient among those steps.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np


def main(golden: Path, run: str, steps: int, out: Path) -> None:
    recording = json.loads((golden / "runs" / f"{run}.json").read_text())
    arrays = np.load(golden / "runs" / f"{run}.npz")
    kept_steps = recording["steps"][:steps]
    micros = [index for step in kept_steps for index in step["micro"]]
    kept = {
        key: arrays[key]
        for key in arrays.files
        if key.startswith(("ref/", "base/0/"))
        or (key.startswith("mb/") and int(key.split("/")[1]) in micros)
    }
    recorded = max(index for index in recording["micro_grad_rows"] if index in micros)
    kept[f"micro_proj/{recorded}"] = arrays[f"micro_proj/{recorded}"]
    kept["weights"] = arrays["weights"][[recording["weight_rows"].index(steps)]]
    recording |= {
        "weight_rows": [steps],
        "grad_rows": [],
        "micro_grad_rows": [recorded],
        "steps": kept_steps,
        "micro": recording["micro"][: len(micros)],
        "refresh": [item for item in recording["refresh"] if item["at_step"] < steps],
    }
    for unused in ("tokenised", "hf_logs", "ref_rows"):
        recording.pop(unused)
    for step in kept_steps:
        del step["param_grad_norm"], step["param_norm"]
    (out / "runs").mkdir(parents=True, exist_ok=True)
    (out / "runs" / f"{run}.json").write_text(json.dumps(recording, separators=(",", ":")))
    np.savez_compressed(out / "runs" / f"{run}.npz", **kept)
    model = out / recording["args"]["model_name_or_path"]
    model.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden / recording["args"]["model_name_or_path"] / name, model / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
