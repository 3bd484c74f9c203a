"""What is compiled: the loss, the step of all trials, the optimizer, and the arrays of packed adapters."""
