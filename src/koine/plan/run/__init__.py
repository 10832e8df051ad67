"""Run a plan: scheduler, workers, executors."""
