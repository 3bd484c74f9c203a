"""Memory, FLOPs and parameters of a trial, estimated before training."""
