"""Group: the ranks that exchange rows, with their settings, memory and failures."""
