"""Send the figures of a training to an experiment tracker: wandb, trackio, MLflow, or one of your own."""
