"""all_reduce_residual_rmsnorm: sum over the ranks, residual and norm in one kernel."""
