"""Studies, in which Optuna chooses the settings: `hydra/sweeper=study`."""
