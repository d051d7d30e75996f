"""all_reduce, reduce_scatter and all_gather: add up or gather the arrays of all ranks."""
