"""ragged_all_to_all and all_to_all_v: move pieces of any size between all ranks."""
