"""Measurements: python -m bench kernels|sampler|step|sandbox; bench.proof, plot, aot,
memory, predict."""
