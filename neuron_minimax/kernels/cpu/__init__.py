"""The operators of the CPU's graphs (../README.md)."""
