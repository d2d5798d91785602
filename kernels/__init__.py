"""Row kernels: the arithmetic between the two matrix products, one module per implementation.

A row kernel works in place on a buffer of logits [C, V] and knows neither the loss nor the matrix products around it.
"""
