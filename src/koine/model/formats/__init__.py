"""Model directories and file formats."""
