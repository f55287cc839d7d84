"""Benchmarks: fused beside eager and torch.compile, each checked against float64 before it is timed."""
