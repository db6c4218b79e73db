"""The table from logical axes to mesh axes."""

import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from ogpsa_jax.models import ShardingRules

MESH = AbstractMesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
KERNEL = ("layers", "embed", ("heads", "embed"))


@pytest.mark.parametrize(
    ("axes", "shape", "wanted"),
    [
        (KERNEL, (3, 64, 16), (None, None, ("tensor", "fsdp"))),
        (KERNEL, (3, 64, 6), (None, "fsdp", "tensor")),  # what 8 does not divide, 2 may
        (KERNEL, (3, 64, 5), (None, "fsdp", None)),
        (("layers", "heads", "embed"), (3, 16, 64), (None, "tensor", "fsdp")),
    ],
)
def test_outputs_come_first_and_inputs_take_what_they_leave(axes, shape, wanted):
    assert ShardingRules().spec(axes, shape, MESH) == PartitionSpec(*wanted)


def test_two_dimensions_on_one_mesh_axis_are_refused():
    rules = ShardingRules(heads="fsdp")
    with pytest.raises(ValueError, match=r"two dimensions of .* on the same mesh axis"):
        rules.spec(("layers", "heads", "embed"), (3, 16, 64), MESH)
    with pytest.raises(ValueError, match="got 'head'"):
        rules.spec(("layers", ("head", "embed")), (3, 16), MESH)
