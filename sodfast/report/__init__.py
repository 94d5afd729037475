"""What runs have left, drawn and counted: one page, its figures and its tables."""
