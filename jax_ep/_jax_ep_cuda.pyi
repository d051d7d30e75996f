"""CUDA twins of jax_ep's operations."""

def registrations() -> dict:
    """Target name to handler capsules."""

def build_info() -> dict:
    """Compiler and FFI API version of this build."""
