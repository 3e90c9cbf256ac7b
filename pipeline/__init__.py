"""From images on disk to two views in memory: sources -> shards -> order -> views."""
