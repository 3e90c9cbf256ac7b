"""What users have: image folders, tars, zips, parquet files, WebDataset tars, synthetic images, and their labels."""
