"""What JAX must know of each custom call: result shapes, lowering, and which transforms it refuses."""
