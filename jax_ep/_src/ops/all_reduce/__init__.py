"""all_reduce, reduce_scatter and all_gather: arrays of all ranks, added up or side by side."""
