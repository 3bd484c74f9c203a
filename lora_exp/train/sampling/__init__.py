"""Text generation: the decoding loop with its cache, samples during training, and conversations."""
