"""What limits training, measured stage by stage: tools/profile_throughput.py."""
