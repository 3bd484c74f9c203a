"""Task metrics: generated answers and choices, decoded and scored for all trials of a pack."""
