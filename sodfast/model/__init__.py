"""A language model: loaded, checked, run on packed sequences."""
