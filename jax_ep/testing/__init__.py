"""Tools for testing on top of jax_ep: named routings, and comparison with the reference."""
