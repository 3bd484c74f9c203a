"""Statistics of numbers by seed: means, differences, intervals and fits. Independent of settings and files."""
