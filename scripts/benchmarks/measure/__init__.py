"""What the benchmarks measure. Each is imported once its command knows its options."""
