"""Stands for vLLM-Neuron, which is on AWS's own index alone: what the plugin imports of it, with
the documented fields.
"""
