"""The embedded default: a tiny model that is warm-started here, with much to unlearn."""
