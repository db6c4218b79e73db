"""The presets as literals: values for the section ``ogpsa`` and for the references.

A configuration may set each key to another value. Combinations without a meaning are refused
(:mod:`ogpsa_jax.config.schema`), never reinterpreted.
"""

from typing import Any, Final

Preset = dict[str, dict[str, Any]]

# The published method: two reference gradients, stale first moments left as they are.
_PAPER: Final[Preset] = {
    "ogpsa": {
        "subspace": "gradients",
        "rank": 2,
        "energy": None,
        "others": None,
        "scope": "tensor",
        "placement": "gradient",
        "rule": "orthogonal",
        "scale": 1.0,
        "refresh": {"every": 30},
        "project_momentum": False,
        "basis_dtype": None,
        "offload": False,
    },
    "references": {"loss": "response", "in_step": None},
}
# The same with what its command for DPO has otherwise.
_PAPER_DPO: Final[Preset] = {
    "ogpsa": {**_PAPER["ogpsa"], "refresh": {"every": 5}},
    "references": {"loss": "official", "in_step": None},
}
# Every step also trains on a reference batch, which costs no extra samples. Projecting the first
# moment would remove what the reference batch adds to it.
_IN_STEP: Final[Preset] = {
    "ogpsa": {
        "subspace": "gradients",
        "rank": 1,
        "energy": None,
        "others": None,
        "scope": "tensor",
        "placement": "gradient",
        "rule": "orthogonal",
        "scale": 1.0,
        "refresh": None,
        "project_momentum": False,
        "basis_dtype": None,
        "offload": False,
    },
    "references": {
        "loss": "response",
        "in_step": {"share": 0.5, "window": None, "replay_weight": 1.0},
    },
}
# The subspace is computed once, before the first step; references are not trained on.
_RECOMMENDED: Final[Preset] = {
    "ogpsa": {
        "subspace": "inputs",
        "rank": 1024,
        "energy": 0.98,
        "others": "freeze",
        "scope": "tensor",
        "placement": "both",
        "rule": "orthogonal",
        "scale": 1.0,
        "refresh": None,
        "project_momentum": False,
        "basis_dtype": None,
        "offload": False,
    },
    "references": {"loss": "response", "in_step": None},
}
# No projection, whatever the other keys say: preset=off on a command line turns it off.
_OFF: Final[Preset] = {
    "ogpsa": {**_PAPER["ogpsa"], "rule": "none", "refresh": None},
    "references": _PAPER["references"],
}
PRESETS: Final[dict[str, Preset]] = {
    "paper": _PAPER,
    "recommended": _RECOMMENDED,
    "in-step": _IN_STEP,
    "off": _OFF,
}
IN_DPO: Final[dict[str, Preset]] = {**PRESETS, "paper": _PAPER_DPO}


def fill_in_preset(raw: Any) -> Any:
    """A configuration as it was read, completed by the keys of its preset.

    Of `references.in_step` too each key counts by itself.
    """
    if not isinstance(raw, dict):
        return raw
    ogpsa, references = raw.get("ogpsa", {}), raw.get("references", {})
    if not isinstance(ogpsa, dict) or not isinstance(references, dict):
        return raw
    presets = IN_DPO if raw.get("objective") == "dpo" else PRESETS
    # The section reports an unknown name.
    preset = presets.get(str(ogpsa.get("preset")), presets["recommended"])
    filled = {**preset["references"], **references}
    in_step = preset["references"]["in_step"]
    if isinstance(in_step, dict) and isinstance(filled["in_step"], dict):
        filled["in_step"] = {**in_step, **filled["in_step"]}
    return {**raw, "ogpsa": {**preset["ogpsa"], **ogpsa}, "references": filled}
