"""Benchmarks of the package: cases with a named peer, verified before they are timed."""
