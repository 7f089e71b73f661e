"""What the operator costs on this machine, beside other implementations: `flash-gsa bench op` (docs/benchmarks.md).

`op.benchmark(op.Options(...))` is the whole of it; a child process measures.
"""
