"""combine and combine_weights: bring rows back to their tokens and add them."""
