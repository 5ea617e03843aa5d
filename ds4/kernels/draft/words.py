"""The words of a step on the device: one block of i32 that its launches read, and that drafting ones write.

All of them have their place on 16 bytes, as kernels want their pointers. ds4/kernels/draft/words.cuh says the same.
"""

from __future__ import annotations

WORDS = 64
POS = 0  # tokens processed: position of the step's first token
TOKENS = 4  # of the step, 8 at most: the one chosen last, then its draft
PAIR = 12  # position of the first pair of the drafting launches
LAST = 16  # position of their last pair
CHAIN = 20  # the token drafted last
DRAFTED = 24  # tokens drafted so far
ACCEPTED = 28  # of the last draft that was verified
STATUS = 32  # 1 where the logits that decided were not finite
