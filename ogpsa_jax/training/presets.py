"""The presets, which fill in the keys of a configuration that it leaves out."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The published method: gradient placement, stale first moment left as it is.
    "paper": {"placement": "gradient", "rank": 2, "project_momentum": False},
    # How these were found: docs/recommended.md.
    "recommended": {"placement": "gradient", "rank": 2, "project_momentum": True},
    "off": {},
}
# Preset recommended, unless the configuration has a word on it (or projects updates, into which
# nothing can be replayed): references that ride in every batch cost no extra samples.
RECOMMENDED_IN_STEP: dict[str, Any] = {"share": 0.5, "window": 64, "replay_weight": 1.0}
# With references that are also trained on, projecting the first moment would take out again what
# they put in.
RECOMMENDED_WITH_REPLAY: dict[str, Any] = {"rank": 4, "project_momentum": False}
# With a subspace of inputs: docs/method.md. What is replayed loses its part in the subspace too, so
# that it weighs more, and nothing is refreshed.
RECOMMENDED_INPUTS: dict[str, Any] = {
    "placement": "both",
    "rank": 1024,
    "energy": 0.95,
    "others": "freeze",
    "project_momentum": False,
}
RECOMMENDED_INPUTS_IN_STEP: dict[str, Any] = {"share": 0.5, "replay_weight": 8.0}
# Refresh intervals of the published commands (paper, appendix; official training scripts).
PUBLISHED_REFRESH = {"sft": {"every": 30}, "dpo": {"every": 5}}


def fill_in_preset(raw: Any) -> Any:
    """A configuration as it was read, with the keys of its preset where it has no word on them."""
    if not isinstance(raw, dict) or not isinstance(raw.get("ogpsa", {}), dict):
        return raw
    objective = raw.get("objective", "sft")
    ogpsa, references = dict(raw.get("ogpsa", {})), raw.get("references", {})
    preset = ogpsa.get("preset", "recommended")
    defaults = dict(PRESETS.get(str(preset), {}))
    if isinstance(objective, str) and objective in PUBLISHED_REFRESH:
        defaults["refresh"] = PUBLISHED_REFRESH[objective]
    if isinstance(references, dict):
        if ogpsa.get("subspace") == "inputs":
            defaults |= RECOMMENDED_INPUTS
            if isinstance(model := raw.get("model"), dict) and model.get("lora") is not None:
                defaults["others"] = "leave"
            if preset == "recommended":
                references = {"in_step": RECOMMENDED_INPUTS_IN_STEP, **references}
        elif preset == "paper" and objective == "dpo":
            references = {"loss": "official", **references}
        elif preset == "recommended" and ogpsa.get("placement") == "update":
            # What leaves the optimizer is projected, whatever its moments hold.
            defaults["project_momentum"] = False
        elif preset == "recommended" and ogpsa.get("placement", "gradient") == "gradient":
            references = {"in_step": RECOMMENDED_IN_STEP, **references}
            in_step = references["in_step"]
            if isinstance(in_step, dict) and in_step.get("replay_weight", 1.0):
                defaults |= RECOMMENDED_WITH_REPLAY
    return {**raw, "ogpsa": {**defaults, **ogpsa}, "references": references}
