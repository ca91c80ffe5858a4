"""What a mixture-of-experts layer costs: the sweep, its records, the profiler and the report."""
