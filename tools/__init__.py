"""Commands around a dataset or a run."""
