"""What is run where vLLM is installed."""
