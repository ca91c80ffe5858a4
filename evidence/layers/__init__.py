"""Public layers as layers under test: a file for each package that says how to read it.

Each file is what ``pytest correctness --layer`` takes, such as ``evidence/layers/from_litgpt.py:mixtral``. It
imports its package when a layer is made.
"""
