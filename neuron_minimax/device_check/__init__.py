"""Hold a new Neuron instance against the CPU: one-layer models first, then the first tokens."""
