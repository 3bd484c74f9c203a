"""A run as a model of lm-eval, the evaluation harness of EleutherAI."""
