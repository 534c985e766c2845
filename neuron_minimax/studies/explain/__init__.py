"""What is in a checkpoint and why, for people: pages, trees, and one FP8 block step by step."""
