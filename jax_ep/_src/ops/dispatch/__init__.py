"""dispatch and dispatch_fp8: rows go to the ranks that own their experts."""
