"""Measurements: python -m bench kernels|sampler|update|step|sandbox; bench.proof, report, aot,
memory, predict; bench/gpu.sh: all of a GPU in one command."""
