"""Names of the Neuron packages, and where AWS has them; imports none of them."""

# Distribution to import name.
PACKAGES = {
    "torch-neuronx": "torch_neuronx",
    "neuronx-distributed": "neuronx_distributed",
    "neuronx-distributed-inference": "neuronx_distributed_inference",
}
# A module that each real package has and the placeholder of its name on the public index has not.
REAL_MODULES = {
    "torch_neuronx": "torch_neuronx.xla_impl.ops",
    "neuronx_distributed": "neuronx_distributed.parallel_layers.parallel_state",
    "neuronx_distributed_inference": "neuronx_distributed_inference.models.model_base",
}
INSTALL = (
    "pip install --extra-index-url https://pip.repos.neuron.amazonaws.com "
    "neuronx-cc torch-neuronx neuronx-distributed neuronx-distributed-inference"
)
