"""How good answers are, by the measures of the benchmarks, and how sure that is."""
