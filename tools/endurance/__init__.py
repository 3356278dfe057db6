"""Long and large: weights beyond 2^31 elements, 20,000 tokens, and a thousand loads in one process."""
