"""What right means for a mixture-of-experts layer: the oracle, the problems, the checks, a run of them."""
