"""The matrix products over FP8 weights with block scales: in torch, as Numba's loops for graphs,
and for Trainium2.
"""
