"""Faults that nobody chose: single edits, drawn at random, and whether the suite finds each."""
