"""Benchmarks of a checkout: every ratio is measured against the eager port of the original in `eager_cosmos`."""
