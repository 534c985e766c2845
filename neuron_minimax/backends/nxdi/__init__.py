"""MiniMax-M2 on AWS Neuron through neuronx-distributed-inference; needs those packages, the CPU
path does not.
"""
