"""Other methods for the same work, written here in plain torch from their papers, as peers of the benchmarks."""
