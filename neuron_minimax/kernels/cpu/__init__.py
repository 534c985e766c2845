"""The operators of the CPU's graphs."""
