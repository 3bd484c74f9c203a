"""What the report says about a group: one file for each question, one sentence with its evidence for each answer."""
