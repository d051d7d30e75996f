"""`python -m jax_ep bench`: the operations against their floor and against stock JAX."""
