"""The matrix products over FP8 weights with block scales: in torch, for compilers, and for Trainium2."""
