"""Decoding that leads on from step to step on the device: lists captured as CUDA graphs, launched ahead, read late."""
