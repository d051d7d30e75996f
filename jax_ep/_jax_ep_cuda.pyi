"""CUDA twins of jax_ep's operations."""



def registrations() -> dict[str, object]:
    """Target name to handler capsules."""

def build_info() -> dict[str, object]:
    """Compiler and FFI API version of this build."""
