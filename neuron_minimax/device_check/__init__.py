"""What a new Neuron instance computes, held against the CPU: a few one-layer models first, then
the first tokens.
"""
