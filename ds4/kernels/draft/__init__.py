"""What drafting adds to a step on the device: the step's words, the tail, joined pairs, blocks, acceptance."""
