"""Run quantized policies: integer linears, kernels, the engine, loading and saving."""
