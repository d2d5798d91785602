"""The cases of `rgpb bench` under pytest-benchmark, and results with their provenance in results/."""
