"""Group: the ranks that exchange rows, what they own and what they fail with."""
