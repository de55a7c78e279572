"""Measurements: python -m bench kernels|sampler|step|sandbox; python -m bench.proof, bench.plot, bench.aot, bench.memory."""
