"""Code that the operations share."""
