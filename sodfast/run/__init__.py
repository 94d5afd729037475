"""What surrounds a run on its machine: its directory, checkpoints, signals, console, clocks."""
