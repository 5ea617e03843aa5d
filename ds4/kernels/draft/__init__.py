"""What drafting adds to a step on the device: the step's words, the tail of streams, joined pairs, acceptance."""
