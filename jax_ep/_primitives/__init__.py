"""What JAX must know of each custom call: result shapes, lowering, what it refuses."""
