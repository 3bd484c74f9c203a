"""Text from a model: the decoding loop with its cache, samples during training, and conversations."""
