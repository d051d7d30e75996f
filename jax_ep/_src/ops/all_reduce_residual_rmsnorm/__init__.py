"""all_reduce_residual_rmsnorm: a sum over the ranks, a residual and a norm in one kernel."""
