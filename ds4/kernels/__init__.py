"""The operations of the network, one folder a family; on CPU tensors each runs its torch reference.

Shapes: an operation gets the rows of one *launch*. On the CPU a launch has a fixed number of rows, of which some carry
tokens (``ds4.kernels.launch``), so that every torch call has the same shapes whatever the number of tokens: that, and
nothing about the inside of torch, is why a token's result does not depend on its neighbours (design.md, "Two forms").
"""
