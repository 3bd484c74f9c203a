"""`python -m lora_exp`; see `lora_exp/cli/main.py`."""

from lora_exp.cli.main import main

if __name__ == "__main__":
  main()
