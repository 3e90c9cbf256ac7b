"""Command-line tools around a dataset or a run."""
