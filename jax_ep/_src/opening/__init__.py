"""Opening a group: its arguments, what its processes agree on, its native half, its self-test."""
