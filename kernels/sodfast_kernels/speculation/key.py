"""The integer that a match is compared by; lookup.py says what it means."""

LONGEST, SHORTEST = 8, 2  # tokens of a match
RANK_BITS, POSITION_BITS = 6, 21
MAX_SOURCES = 1 << RANK_BITS
MAX_TOKENS = 1 << POSITION_BITS  # of a text
NONE = -1  # no source, and no draft
