"""The opening of a group: arguments, agreement of processes, native half and self-test."""
