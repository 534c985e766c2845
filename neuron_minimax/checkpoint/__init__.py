"""Checkpoints on disk: the table of weights, headers, FP8 bytes, reports, and streaming new
ones.
"""
