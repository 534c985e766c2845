"""The degree of expert parallelism, which vLLM-Neuron's worker settles before it makes a model."""

ep_degree = 1


def get_neuron_ep_degree() -> int:
    return ep_degree
