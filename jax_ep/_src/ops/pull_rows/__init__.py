"""pull_rows: each rank reads rows of its peers' arrays by index."""
