"""Does it fit? The bytes of a run, phase by phase, before it starts."""
