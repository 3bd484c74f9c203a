"""The findings about a group: one file per question, and one sentence with its evidence per answer."""
