"""Features that a model computes once per row and the processor then reads: images, mentions, posts."""
