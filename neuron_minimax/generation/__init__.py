"""Tokens in, tokens out: tokenizer, chat formats, sampling, the engine, conversations, and LLM."""
