"""Numbers by seed: means, differences, intervals and fits. No setting and no file is known here."""
