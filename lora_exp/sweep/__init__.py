"""Many runs from one command: which of them share a program, and how they are started, resumed and remembered."""
