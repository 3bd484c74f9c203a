"""What Hydra loads of lora_exp."""
