"""From the student's live weights to samples: engines behind one protocol."""
