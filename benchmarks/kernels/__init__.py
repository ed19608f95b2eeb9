"""Large kernels: fused CUDA kernels, products without a matrix, exact GPs by iteration."""
