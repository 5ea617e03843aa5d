"""Runs the CUDA kernels of ds4 on the CPU, for tests: see README.md beside this file."""
