"""Tokens in, tokens out: the checkpoint's tokenizer, sampling, the decoding loop and MiniMax's
output format.
"""
