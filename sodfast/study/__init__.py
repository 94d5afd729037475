"""Many runs as one experiment: expanded from a file, started, watched, resumed."""
