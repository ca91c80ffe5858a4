"""What a mixture-of-experts layer costs: the sweep, its records, the profiler and the report."""

import os

# Read by OpenMP when torch is loaded: threads that wait for work sleep instead of spinning, which on a busy
# machine, or with two measured processes, takes the time of those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's, which prints lines of its own otherwise
