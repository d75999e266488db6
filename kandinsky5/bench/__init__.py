"""Benchmarks that need both the model and the memory manager, which do not know each other."""
