"""Speed, as ratios against a peer in the same run; `benchmarks/README.md` says how each number is
taken.
"""
