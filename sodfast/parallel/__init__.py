"""Where weights are when one device does not hold them all: several ranks, or host memory."""
