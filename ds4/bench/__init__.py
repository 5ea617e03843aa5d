"""``ds4 bench``: tokens a second over the length of the context, and how far they are from the memory's speed."""
