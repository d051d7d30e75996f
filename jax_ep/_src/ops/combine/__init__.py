"""combine and combine_weights: rows come back to their tokens and are added."""
