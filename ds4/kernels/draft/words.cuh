// The words of a step on the device, i32 [64]; words.py says the same.
#pragma once

enum Word { kPos = 0, kTokens = 4, kPair = 12, kLast = 16, kChain = 20, kDrafted = 24, kAccepted = 28, kStatus = 32 };
