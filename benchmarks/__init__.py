"""What a mixture-of-experts layer costs: the sweep, its records, the profiler and the report."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's, which prints lines of its own otherwise
