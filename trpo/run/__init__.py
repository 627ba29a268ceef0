"""What a run leaves behind, and what it says on its way."""
