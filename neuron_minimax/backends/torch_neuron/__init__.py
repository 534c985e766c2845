"""The backend of torch.compile on Neuron: one process per rank, plain torch with static shapes."""
