"""Statistics of numbers by seed: means, ratios, intervals and fits. Independent of settings and files."""
