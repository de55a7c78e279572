"""Measurements: python -m bench kernels|sampler|step|sandbox; bench.proof, bench.plot, bench.aot."""
