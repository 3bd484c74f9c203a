"""Runs and packs as jobs of joblib, Ray and SLURM."""
