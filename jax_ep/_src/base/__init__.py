"""Facts and tools that know no open group: settings, errors, specifications, JAX's versions."""
