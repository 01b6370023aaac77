"""The gpt-oss model over packed weights, and the small one made on the spot."""
