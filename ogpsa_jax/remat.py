"""What the backward pass keeps of a layer, and where: the named policies of rematerialization."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal[
    "none",
    "full",
    "dots",
    "save_qkv_proj",
    "save_dot_except_mlp",
    "full_offloaded",
    "qkv_proj_offloaded",
    "dots_offloaded",
]
# Names of values in a layer, given by `jax.ad_checkpoint.checkpoint_name`.
LAYER_INPUT, QKV_PROJ, OUT_PROJ = "layer_input", "qkv_proj", "out_proj"
_DEVICE, _HOST = "device", "pinned_host"


def named(x: jax.Array, name: str) -> jax.Array:
    """The array, under a name by which policies know it."""
    return checkpoint_name(x, name)  # type: ignore[no-untyped-call]


def check_remat(remat: str) -> None:
    """Refuse an unknown policy.

    Raises:
      ValueError: so it is.
    """
    if remat not in get_args(Remat):
        raise ValueError(f"remat must be one of {', '.join(get_args(Remat))}, got {remat!r}")


def remat_policy(remat: Remat) -> Callable[..., Any] | None:
    """The policy of :func:`jax.checkpoint`; None keeps nothing but the layer's input.

    ``none`` has no policy: there :func:`jax.checkpoint` is not used.
    """
    policies = jax.checkpoint_policies
    if remat == "dots":
        return policies.dots_with_no_batch_dims_saveable
    if remat == "dots_offloaded":
        return policies.offload_dot_with_no_batch_dims(_DEVICE, _HOST)
    if remat == "save_qkv_proj":
        return policies.save_only_these_names(QKV_PROJ)
    if remat == "save_dot_except_mlp":
        return policies.save_only_these_names(QKV_PROJ, OUT_PROJ)
    offloaded = {"full_offloaded": [LAYER_INPUT], "qkv_proj_offloaded": [LAYER_INPUT, QKV_PROJ]}
    if remat in offloaded:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=offloaded[remat],
            offload_src=_DEVICE,
            offload_dst=_HOST,
        )
    return None
