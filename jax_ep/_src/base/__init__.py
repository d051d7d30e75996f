"""Facts and tools that know nothing of groups: settings, errors, specifications, JAX's versions."""
