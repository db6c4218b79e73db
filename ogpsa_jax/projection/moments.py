"""Which trees of an optimizer's state are first moments: sums of gradients that later steps use.

A state says nothing of what its trees contain, so every tree that is shaped like the parameters is
judged by the name of its field, and by the type of its owner where a name means different things.
What is not known is refused by name. The tests check each judgement on every optimizer of Optax
against its behaviour: a first moment, and nothing else, changes its sign with the gradients.
"""

from typing import Any

MOMENTS = frozenset(
    "mu m trace ema exp_avg momentum velocity"  # running means
    " prev_updates previous_gradient"  # of Rprop, and of optimistic gradient descent
    " grad_acc acc_grads".split()  # of optax.apply_every and MultiSteps
)

OTHERS = frozenset(
    "nu nu_max exp_avg_sq sum_of_squares e_g e_x v_row v_col"  # of squares
    " grad_sum step_sizes"  # what only sets the size of steps
    " grad updates"  # of a line search, at the point it found: no gradient of the past
    " params params0 init_params ns_coeffs".split()
)

BY_TYPE: dict[str, dict[str, bool]] = {
    # v averages differences of gradients, g is the last gradient, n the second moment.
    "ScaleByAdanState": {"v": True, "g": True, "n": False},
    "ScaleByAdemamixState": {"m1": True, "m2": True},
    "ScaleBySimplifiedAdEMAMixState": {"n": False},
    "FactoredState": {"v": False},
    # nu averages what is already divided by the root of the accumulators in mu.
    "ScaleBySM3State": {"nu": True, "mu": False},
    # mu² is subtracted from nu, which must stay the larger of the two.
    "ScaleByRStdDevState": {"mu": False},
    "ScaleByRStdDevWithCountState": {"mu": False},
}

_RETURNS = (
    "its steps lead to a place counted from earlier parameters, so that gradients it has already "
    "followed come back"
)
IMPOSSIBLE: dict[str, str] = {
    "COCOBState": _RETURNS,
    "LookaheadState": _RETURNS,
    "MadgradState": _RETURNS,
    "MechanicState": _RETURNS,
    "SAMState": _RETURNS,
    "ScheduleFreeState": _RETURNS,
    "GaLoreState": "it keeps its moments in low-rank spaces of its own",
    "ScaleByLBFGSState": "it makes its steps from past differences of parameters and gradients",
}

# What divides the first moment of the same state. Sophia's is not here: its ratio is clipped.
_SECOND = ("nu", "n", "exp_avg_sq")
_UNDIVIDED = ("ScaleBySM3State", "SophiaState")


def is_moment(owner: Any, field: str) -> bool | None:
    """Whether the field of a state of type `owner` is a first moment; None if that is not known."""
    known = BY_TYPE.get(owner.__name__, {}).get(field)
    if known is not None:
        return known
    return True if field in MOMENTS else False if field in OTHERS else None


def why_impossible(node: Any) -> str | None:
    """Why the steps of the optimizer with this state cannot be freed of past gradients, or None."""
    if type(node).__name__ == "SAMState" and node.cache is None:  # opaque: no step goes back
        return None
    return IMPOSSIBLE.get(type(node).__name__)


def second_moment(owner: Any, children: dict[str, Any]) -> Any:
    """What divides the first moments in `children`, the fields of a state, or None."""
    if owner.__name__ in _UNDIVIDED:
        return None
    return next((children[name] for name in _SECOND if name in children), None)
