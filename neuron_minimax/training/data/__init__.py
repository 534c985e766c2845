"""Training data: rows from files or made from a seed, and the sequences that a tokenizer makes."""
