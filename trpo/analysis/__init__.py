"""What runs have recorded: curves over seeds, statistics, pictures."""
