"""Claims of the four papers, tried on small models: `python -m benchmarks.papers --out benchmarks/results/papers`."""
