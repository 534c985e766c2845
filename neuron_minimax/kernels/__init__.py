"""The matrix products over FP8 weights with block scales: in torch, in C++ for graphs, and for
Trainium2.
"""
