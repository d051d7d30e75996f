"""The code behind the public names of jax_ep. Floors: base, processes, group, ops, opening."""
