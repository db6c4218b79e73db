"""The method: pure pytree maths (groups, subspace, project), then a thin Optax shell over it."""
