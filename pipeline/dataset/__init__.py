"""A dataset on a disk or behind a URL: format, reading, fetching."""
