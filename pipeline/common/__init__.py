"""What all parts of the pipeline use: errors, files, locations, buffers, system."""
